"""Small files that ship with the project; jobs/pretrain/ has the scripts that train the weights."""

from pathlib import Path

DEMO_TEACHER = Path(__file__).parent / "demo" / "teacher.safetensors"
"""A small DINOv2-like ViT, self-distilled on scikit-learn's digits."""

DEMO_AUTOENCODER = Path(__file__).parent / "demo" / "autoencoder"
"""A diffusers AutoencoderKL for the same images."""

REPORT_STYLE = Path(__file__).parent / "report.css"
"""CSS of a report."""
