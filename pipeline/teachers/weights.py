"""Weights of a teacher: a file in its authors' key format or timm's, the demo's, or random ones."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from pipeline.assets import DEMO_TEACHER
from schemas.errors import UserError
from schemas.extract import TeacherConfig


def load_weights(vit: Any, config: TeacherConfig) -> None:
    """Fill a timm vision transformer as ``config.weights`` says. Raises ``UserError``."""
    if config.weights == "random":
        randomise(vit, config.seed)
        return
    path = DEMO_TEACHER if config.weights == "demo" else Path(config.weights).expanduser()
    state = read_state_dict(path, option="--teacher.weights")
    # The module that defines the model knows its authors' key formats and resamples the position
    # embedding to the model's grid (bicubic, antialiased), as the HASTE reference does.
    convert = getattr(sys.modules[type(vit).__module__], "checkpoint_filter_fn", None)
    if convert is not None:
        state = convert(state, vit)
    state = {name: value for name, value in state.items() if not name.startswith("head.")}
    try:
        vit.load_state_dict(state)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()]
        first = lines[1] if len(lines) > 1 else lines[0]
        raise UserError(
            f"--teacher.weights '{path}' do not fit '{config.model}': {first[:200]}"
        ) from None


def read_state_dict(path: Path, *, option: str) -> dict[str, Tensor]:
    """Tensors of a .safetensors, .pth or .pt file, the last two without unpickling code."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        reason = "no such file" if not path.exists() else " ".join(str(error).split())[:200]
        raise UserError(f"{option} '{path}': cannot read these weights ({reason})") from None
    except Exception as error:  # safetensors raises its own type, which it does not export
        raise UserError(f"{option} '{path}': cannot read these weights ({error})") from None
    if not isinstance(state, dict):
        raise UserError(f"{option} '{path}': expected a state dict, found {type(state).__name__}")
    return state


@torch.no_grad()
def randomise(vit: nn.Module, seed: int) -> None:
    """Seeded random weights under which attention and features behave as in a trained model.

    timm's own initialisation has layer scales of 1e-5, which makes every block a no-op. Here layer
    scales are about 0.5 and qkv weights wide enough for attention logits of std about 2.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(tensor: Tensor, std: float, mean: float = 0.0) -> None:
        values = torch.randn(tensor.shape, generator=generator) * std + mean
        tensor.copy_(values)

    norms = {
        name
        for name, module in vit.named_modules()
        if isinstance(module, nn.LayerNorm | nn.GroupNorm | nn.RMSNorm)
    }
    for name, parameter in vit.named_parameters():
        owner, _, leaf = name.rpartition(".")
        if leaf == "gamma" or leaf.startswith("gamma_"):
            normal(parameter, 0.2, mean=0.5)
        elif owner in norms and leaf == "weight":
            normal(parameter, 0.2, mean=1.0)
        elif leaf.endswith("bias"):
            normal(parameter, 0.1)
        elif leaf == "weight":
            std = min(max(parameter[0].numel() ** -0.5, 0.05), 0.2)
            normal(parameter, min(1.3 * std, 0.25) if "qkv" in owner else std)
        else:  # class and register tokens, position embedding
            normal(parameter, 0.2)
