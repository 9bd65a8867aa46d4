"""Difference of sampled pixels by the student's arithmetic, against float32 uncompiled."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor

from pipeline.autoencoders import open_decoder
from pipeline.checkpoints.resolve import find_checkpoint, local_copy
from pipeline.checkpoints.student import load_trained_student
from pipeline.precision import choose_device
from pipeline.sampling.generate import compile_student, draw_images
from schemas.diffusion import SamplerConfig
from schemas.errors import UserError
from schemas.sample import Arithmetic
from tests.bench.options import PixelsOptions as Options
from tests.bench.report import Heading, Report, Table

HEADINGS = (
    Heading("sampler", "sampler"),
    Heading("arithmetic", "arithmetic"),
    Heading("mean", "mean", ".3f"),
    Heading("rms", "RMS", ".3f"),
    Heading("psnr", "PSNR dB", ".1f"),
    Heading("above", "above 8", ".4f"),
    Heading("most", "most", ".0f"),
)


def run(options: Options) -> Report:
    """*Above 8*: part of the values (0 to 255) that differ by more. The same noise is drawn."""
    torch.set_num_threads(options.threads)
    device = choose_device(options.device)
    with local_copy(find_checkpoint(options.checkpoint), "ema") as checkpoint:
        trained = load_trained_student(checkpoint, "ema")
    student = trained.student.to(device)
    if student.config.family == "MMDiT":
        raise UserError("--checkpoint is of a student of captions; choose one of classes")
    autoencoder = open_decoder(options.autoencoder, trained.encoder).to(device)
    classes = trained.classes.trained
    labels = [classes[i % len(classes)] for i in range(options.images)]

    def draw(sampler: SamplerConfig, precision: Arithmetic, size: int) -> Tensor:
        parts = [
            draw_images(
                student,
                autoencoder,
                labels[first : first + size],
                sampler,
                first_index=first,
                precision=precision,
            )
            for first in range(0, len(labels), size)
        ]
        return torch.cat(parts).float()

    samplers = {
        method: SamplerConfig.model_validate(
            {"method": method, "steps": options.steps, "guidance": options.guidance}
        )
        for method in options.methods
    }
    size = options.images
    references = {name: draw(sampler, "float32", size) for name, sampler in samplers.items()}
    rows: list[dict[str, Any]] = []
    eager = ["float32, half the batch", *(["tf32"] if device == "cuda" else []), "bfloat16"]
    for arm in (*eager, *(f"{name}, compiled" for name in ("float32", "bfloat16"))):
        if arm == "float32, compiled":
            compile_student(student)
        for name, sampler in samplers.items():
            part = -(-size // 2) if "half" in arm else size
            images = draw(sampler, cast(Arithmetic, arm.split(",")[0]), part)
            row = dict(differences(images, references[name]))
            rows.append({"sampler": name, "arithmetic": arm, **row})
    about = {
        "checkpoint": options.checkpoint,
        "images": options.images,
        "steps": options.steps,
        "guidance": options.guidance,
        "device": device,
    }
    worst = max(row["mean"] for row in rows if row["arithmetic"] == "bfloat16, compiled")
    title = f"pixels of {student.config.model}, 0 to 255"
    return Report(about, [Table(title, HEADINGS, rows)], {"mean_of_bfloat16_compiled": worst})


def differences(images: Tensor, reference: Tensor) -> Iterator[tuple[str, float | None]]:
    """Differences of values from 0 to 255, by name."""
    error = (images.double() - reference.double()).abs()
    rms = float(error.square().mean().sqrt())
    yield "mean", float(error.mean())
    yield "rms", rms
    yield "psnr", 20 * float(torch.log10(torch.tensor(255 / rms))) if rms else None
    yield "above", float((error > 8).double().mean())
    yield "most", float(error.max())
