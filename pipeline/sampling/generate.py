"""Images from a student; image i is a function of its number, its class or caption and the seed
only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.autoencoders import Autoencoder, decode_scaled
from pipeline.diffusion.samplers import NullLabel, State, sample, sample_jointly
from pipeline.models import MMDiT, Student
from pipeline.precision import arithmetic, autocast_dtype
from pipeline.sampling.noise import NoiseAhead
from schemas.diffusion import Convention, Path, SamplerConfig
from schemas.errors import UserError
from schemas.sample import Arithmetic
from schemas.student import StudentConfig


class Context(NamedTuple):
    """Embeddings that B images are conditioned on."""

    captions: Tensor
    """Captions, float32 (B, T, E)."""
    null: Tensor | None = None
    """A negative prompt (T, E); None: the null caption that the student was trained on."""


Labels = Sequence[int] | Context
"""Classes or captions of images."""


def check_sampler(
    student: StudentConfig, sampler: SamplerConfig, *, option: str = "--sampler.method"
) -> None:
    """Raises ``UserError`` where the sampling method does not suit the student's model family, or
    a class token is to be guided that it does not have; ``option`` names the method."""
    if (sampler.method == "ddpm") != (student.family == "DiT"):
        needed = "ddpm" if student.family == "DiT" else "sde, ode or ode_heun"
        raise UserError(
            f"sampler method {sampler.method} cannot draw from {student.model}: set "
            f"{option} {needed}"
        )
    if sampler.class_guidance is not None and student.class_token is None:
        raise UserError(
            f"{option.removesuffix('method')}class-guidance is for a student that denoises a class "
            "token (student.class_token); this one has none: leave it out"
        )


def check_guidance(null_label: int | None, sampler: SamplerConfig, *, option: str) -> None:
    """Raises ``UserError`` where guidance asks for "no class" or no caption, which a student was
    not trained on; ``option`` names the guidance."""
    if sampler.guidance != 1 and null_label is None:
        raise UserError(
            f"{option} {sampler.guidance:g} needs a student that was also trained without classes "
            "or captions (a label drop above 0); this one was not: use 1"
        )


def compile_student(student: Student) -> None:
    """Compile each block and the final layer, whose code equal blocks share, for each size of a
    batch: all of it, the guided part, a last one."""
    for part in (*student.blocks, student.final_layer):
        part.compile(dynamic=False)


def draw_images(
    student: Student,
    autoencoder: Autoencoder,
    labels: Labels,
    config: SamplerConfig,
    *,
    path: Path | None = None,
    first_index: int = 0,
    precision: Arithmetic = "float32",
) -> Tensor:
    """uint8 (B, 3, R, R) on the CPU. Image i depends only on the seed, ``first_index + i`` and its
    class or caption, so that any split into batches or workers draws the same images. Raises
    ``UserError`` where the latents are not finite."""
    latents = draw_latents(
        student, labels, config, path=path, first_index=first_index, precision=precision
    )
    if not latents.isfinite().all():
        raise UserError(
            f"latents are not finite: has the training diverged? (precision {precision})"
        )
    with arithmetic(precision):
        return decode_scaled(autoencoder, latents).cpu()


def draw_latents(
    student: Student,
    labels: Labels,
    config: SamplerConfig,
    *,
    path: Path | None = None,
    first_index: int = 0,
    precision: Arithmetic = "float32",
) -> Tensor:
    """Scaled latents of the same images, float32 (B, C, h, w) on the student's device. ``path`` is
    that of a student in training; by default the one in its convention."""
    check_sampler(student.config, config)
    negative = isinstance(labels, Context) and labels.null is not None
    null = 0 if negative else student.null_label
    check_guidance(null, config, option="--sampler.guidance")
    device = next(student.parameters()).device
    y_B, null_label = _conditions(student, labels, device)
    shapes: list[tuple[int, ...]] = [student.config.latent_shape]
    if student.config.class_token is not None:
        shapes.append((student.config.class_token,))
    dtype = autocast_dtype(precision)

    def predict(state: State, t: Tensor, y: Tensor) -> list[Tensor]:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            token = {"class_token_BE": state[1]} if len(state) > 1 else {}
            out = student(state[0], t, y, **token)
        return [x for x in (out.prediction, out.class_prediction) if x is not None]

    images = range(first_index, first_index + len(y_B))
    draws = 1 if config.method.startswith("ode") else config.steps
    noise = NoiseAhead(config.seed, images, shapes, device, count=draws)
    with arithmetic(precision), noise:
        if config.method == "ddpm":
            latents = sample(
                lambda x, t, y: predict([x], t, y)[0],
                noise()[0],
                y_B,
                config,
                null_label=null_label,
                step_noise=lambda _: noise()[0],
            )
        else:
            latents = sample_jointly(
                predict,
                noise(),
                y_B,
                config,
                null_label=null_label,
                convention=student.convention if path is None else Convention(path=path),
                step_noise=lambda _: noise(),
            )[0]
    return latents.float()


def _conditions(student: Student, labels: Labels, device: torch.device) -> tuple[Tensor, NullLabel]:
    """Condition of each image and that without class or caption, on ``device``. Raises
    ``ValueError`` where ``labels`` are not what the student was trained on."""
    if isinstance(student, MMDiT) != isinstance(labels, Context):
        raise ValueError(f"{student.config.model} cannot draw {type(labels).__name__}")
    if not isinstance(labels, Context):
        return _to_device(torch.tensor(labels), device), student.null_label
    null = labels.null
    if null is None and isinstance(student, MMDiT) and student.null_label is not None:
        null = student.null_context
    return _to_device(labels.captions, device), None if null is None else null.to(device)


def _to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy to a GPU from pinned memory, because Python would wait for a copy from other memory and
    for all work queued before it."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
