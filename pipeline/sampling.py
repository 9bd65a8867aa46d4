"""Images from a trained checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pipeline.autoencoders import Autoencoder
from pipeline.diffusion.samplers import sample
from pipeline.models import SiT, make_student
from pipeline.models.checkpoints import student_from_file
from pipeline.randomness import Purpose, generator
from pipeline.train.checkpoint import CheckpointState, load_weights, read_state
from pipeline.train.local import newest_checkpoint
from schemas.diffusion import Path as DiffusionPath
from schemas.diffusion import SamplerConfig
from schemas.errors import UserError
from schemas.student import StudentConfig

PUBLISHED_AUTOENCODER = "stabilityai/sd-vae-ft-ema"
"""What the authors of SiT, REPA and HASTE decode with."""


@dataclass(frozen=True)
class Trained:
    """A student, and what is needed to draw from it."""

    student: SiT
    path: DiffusionPath
    autoencoder: str
    """Name of the decoder, where nobody asks for another."""


def open_trained(checkpoint: Path, weights: str = "ema", model: str | None = None) -> Trained:
    """A run's folder or one checkpoint's; or a file of the SiT, REPA or HASTE repositories, of
    which only the asker knows that it is a ``model``. Raises ``UserError``."""
    if checkpoint.is_file() or checkpoint.suffix in (".pt", ".pth"):
        if model is None:
            raise UserError(
                f"--checkpoint '{checkpoint}' does not say what it is: add --model, for example "
                "--model SiT-XL/2"
            )
        student = student_from_file(checkpoint, model, weights)
        return Trained(student.requires_grad_(False).eval(), "linear", PUBLISHED_AUTOENCODER)
    if model is not None:
        raise UserError(
            f"--model is for a .pt file; --checkpoint '{checkpoint}' is a folder that says what "
            "it holds"
        )
    student, state = load_student(checkpoint, weights)
    return Trained(student, state.config.diffusion.path, state.autoencoder.name)


def load_student(folder: Path, weights: str = "ema") -> tuple[SiT, CheckpointState]:
    """The student of a checkpoint, or of a run's newest one, and the checkpoint's state."""
    newest = newest_checkpoint(folder)
    if newest is None:
        raise UserError(f"--checkpoint '{folder}' holds no checkpoint")
    state = read_state(newest)
    student = make_student(state.config.student)
    load_weights(newest, weights, student)
    return student.requires_grad_(False).eval(), state


def check_sampler(student: StudentConfig, sampler: SamplerConfig) -> None:
    """Raises ``UserError`` where this method does not draw from this student."""
    if (sampler.method == "ddpm") != (student.family == "DiT"):
        needed = "ddpm" if student.family == "DiT" else "sde, ode or ode_heun"
        raise UserError(
            f"sampler method {sampler.method} cannot draw from {student.model}: set "
            f"--sampler.method {needed}"
        )


def draw_images(
    student: SiT,
    autoencoder: Autoencoder,
    labels: Sequence[int],
    config: SamplerConfig,
    *,
    path: DiffusionPath = "linear",
    first_index: int = 0,
) -> Tensor:
    """uint8 (B, 3, R, R) on the CPU. Image i depends on the seed, ``first_index + i`` and its
    label alone, so that any split into batches or workers draws the same images."""
    check_sampler(student.config, config)
    device = next(student.parameters()).device
    shape = student.config.latent_shape

    def normals(draw: int) -> Tensor:
        """Standard normal numbers of one draw, (B, C, h, w)."""
        numbers = [
            generator(Purpose.SAMPLING, config.seed, first_index + i, draw).standard_normal(
                shape, dtype=np.float32
            )
            for i in range(len(labels))
        ]
        return torch.from_numpy(np.stack(numbers)).to(device)

    latents = sample(
        lambda x, t, y: student(x, t, y).prediction,
        normals(0),
        torch.tensor(labels, device=device),
        config,
        null_label=student.config.num_classes,
        path=path,
        step_noise=lambda step: normals(step + 1),
    )
    return autoencoder.decode(latents.float()).cpu()
