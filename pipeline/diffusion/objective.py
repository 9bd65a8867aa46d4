"""Denoising objectives: corruption of latents and loss of a prediction."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from pipeline.diffusion.ddpm import ImprovedDdpm
from pipeline.diffusion.interpolant import denoising_loss, interpolate
from schemas.diffusion import DiffusionConfig, Path
from schemas.student import StudentConfig


class Objective(Protocol):
    """Denoising objective of a family of students."""

    def corrupt(
        self, latents_BChw: Tensor, noise_BChw: Tensor, t_B: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Noisy latents, the time input of the network (B,) and the target, for t in [0, 1)."""

    def loss(
        self, prediction: Tensor, noisy_BChw: Tensor, time_B: Tensor, target_BChw: Tensor
    ) -> Tensor:
        """Loss per sample (B,), from the prediction and the outputs of ``corrupt``."""


class FlowMatching:
    """Objective of SiT: squared error of the velocity along an interpolant."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def corrupt(
        self, latents_BChw: Tensor, noise_BChw: Tensor, t_B: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        noisy, velocity = interpolate(self.path, latents_BChw, noise_BChw, t_B)
        return noisy, t_B, velocity

    def loss(
        self, prediction: Tensor, noisy_BChw: Tensor, time_B: Tensor, target_BChw: Tensor
    ) -> Tensor:
        return denoising_loss(prediction, target_BChw)


def make_objective(student: StudentConfig, diffusion: DiffusionConfig) -> Objective:
    """Objective of the student's family."""
    return ImprovedDdpm() if student.family == "DiT" else FlowMatching(diffusion.path)
