"""Draw a grid of images from a trained checkpoint.

python jobs/sample.py --checkpoint runs/demo --classes 1,2,3 --png samples.png
python jobs/sample.py --checkpoint FILE.pt --model SiT-XL/2 --classes 207,360 --png samples.png
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from tqdm import tqdm

from pipeline.autoencoders import Autoencoder
from pipeline.pictures import save_grid
from pipeline.sampling.draw import draw_images
from pipeline.sampling.trained import open_trained
from schemas.errors import UserError, run_command
from schemas.options import parse_options
from schemas.sample import SampleConfig


def main(argv: list[str]) -> int:
    config = parse_options(
        SampleConfig,
        argv,
        command="python jobs/sample.py",
        about="Draw a grid of images, one row for each class, from a trained checkpoint.",
    )
    print(draw_grid(config))
    return 0


def draw_grid(config: SampleConfig) -> Path:
    """Write the grid and return its path. Raises ``UserError``."""
    if config.checkpoint is None:
        raise UserError(
            "--checkpoint is missing: the folder of a run or of one checkpoint, or a .pt file"
        )
    if not config.classes:
        raise UserError("--classes is empty: name class numbers such as 1,2,3")
    if config.png is None:
        raise UserError("--png is missing: the picture file to write")
    checkpoint = Path(config.checkpoint).expanduser()
    trained = open_trained(checkpoint, config.weights, config.model)
    student = trained.student
    classes = student.config.num_classes
    if max(config.classes) >= classes:
        raise UserError(
            f"--classes asks for class {max(config.classes)}; the model has classes 0 to "
            f"{classes - 1}"
        )
    autoencoder = Autoencoder(config.autoencoder or trained.autoencoder)
    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    elif device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this machine has no GPU that torch can use")
    student.to(device)
    autoencoder.to(device)
    labels = [label for label in config.classes for _ in range(config.per_class)]
    images = []
    for start in tqdm(range(0, len(labels), config.batch_size), unit="batch", desc="sample"):
        images.append(
            draw_images(
                student,
                autoencoder,
                labels[start : start + config.batch_size],
                config.sampler,
                path=trained.path,
                first_index=start,
            )
        )
    path = Path(config.png).expanduser()
    names = [str(label) for label in config.classes]
    save_grid(torch.cat(images), path, columns=config.per_class, row_names=names)
    return path


if __name__ == "__main__":
    run_command(main)
