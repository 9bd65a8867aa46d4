"""Sustained rates of a device, measured on a few batches.

Random numbers replace weights and images, because only shapes decide the time of a product.
Two equal blocks of the teacher are timed, and on a CPU of the student; the rest follows from FLOPs.
"""

from __future__ import annotations

import copy
import io
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import nn

from pipeline.cost_estimate.costs import TERA, DeviceRates
from pipeline.cost_estimate.flops import autoencoder_flops, teacher_flops
from pipeline.cost_estimate.meta_models import MetaModels, encode
from pipeline.datasets.crop import decode_crop
from pipeline.models.factory import blank_condition, make_student
from pipeline.models.flops import STEP, student_flops
from pipeline.precision import precision_dtype
from pipeline.teachers.vit import block_arguments
from schemas.extract import ExtractConfig
from schemas.run import RunConfig

MAX_SECONDS = 1.5  # for each network, after its warm-up
MAX_REPEATS = 7
TIMED_BLOCKS = 2
DECODING_THREADS = 8  # of an encoder on a GPU, at most
ASSUMED_TFLOPS = 200.0  # sustained by an H100 in a transformer in bfloat16


@dataclass(frozen=True)
class Device:
    """The hardware of one worker and its rates."""

    name: str
    kind: Literal["cuda", "cpu", "given"]
    cores: int  # threads: for arithmetic on a CPU, for decoding otherwise
    rates: DeviceRates
    basis: Literal["measured", "given", "assumed"]  # by an option; without a GPU


def unmeasured_device(tflops: float | None, resolution: int) -> Device:
    """A device of ``tflops``, or the assumed GPU. Only decoding is timed, on one core here."""
    rate = (tflops or ASSUMED_TFLOPS) * TERA
    rates = DeviceRates(
        teacher=rate,
        autoencoder=rate / 10,  # float32, whose peak is a fifteenth of bfloat16's
        student=rate,
        decode_seconds=decode_seconds(resolution) / DECODING_THREADS,
        decode_overlaps=True,
    )
    name = f"a device of {tflops:g} TFLOP/s" if tflops else "an assumed GPU"
    return Device(name, "given", DECODING_THREADS, rates, "given" if tflops else "assumed")


def measure_device(
    config: ExtractConfig,
    run: RunConfig,
    models: MetaModels,
    *,
    gpu: bool,
) -> Device:
    """Time this machine's GPU, or its CPU with all of torch's threads."""
    device = torch.device("cuda" if gpu else "cpu")
    cores = min(DECODING_THREADS, os.cpu_count() or 1) if gpu else torch.get_num_threads()
    rates = DeviceRates(
        teacher=_teacher_rate(
            models,
            device,
            dtype=precision_dtype(config.precision, device.type),
            batch=config.batch_size if gpu else 2,
        ),
        autoencoder=_autoencoder_rate(models.autoencoder, config.resolution, device),
        student=_student_rate(run, device),
        decode_seconds=decode_seconds(config.resolution) / cores,
        decode_overlaps=gpu,
    )
    name = torch.cuda.get_device_name() if gpu else f"this CPU, {cores} threads"
    return Device(name, "cuda" if gpu else "cpu", cores, rates, "measured")


def median_seconds(
    call: Callable[[], Any], device: torch.device, limit: float = MAX_SECONDS
) -> float:
    """Median time of ``call`` after a warm-up, repeated for about ``limit`` seconds."""
    cuda = device.type == "cuda"
    warm_up = 3 if cuda else 1
    times: list[float] = []
    while len(times) <= warm_up or (
        len(times) < warm_up + MAX_REPEATS and sum(times[warm_up:]) < limit
    ):
        began = time.perf_counter()
        call()
        if cuda:
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - began)
    return statistics.median(times[warm_up:])


def decode_seconds(resolution: int) -> float:
    """Seconds for one thread to decode a JPEG of 500 x 375 pixels, ImageNet's usual size, and crop
    it to ``resolution``."""
    coarse = np.random.default_rng(0).integers(0, 256, (47, 63, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    image = Image.fromarray(coarse).resize((500, 375), Image.Resampling.BICUBIC)
    image.save(buffer, "JPEG", quality=95)
    data = buffer.getvalue()
    return median_seconds(lambda: decode_crop(data, resolution), torch.device("cpu"), limit=0.5)


def _teacher_rate(
    models: MetaModels, device: torch.device, *, dtype: torch.dtype, batch: int
) -> float:
    """FLOP per second of the first blocks."""
    modules = [_materialised(block, device) for block in models.vit.blocks[:TIMED_BLOCKS]]
    arguments = [
        {name: torch.randn(value.shape, device=device) for name, value in extra.items()}
        for extra in block_arguments(models.vit)[:TIMED_BLOCKS]
    ]
    inputs = torch.randn(batch, models.geometry.tokens, models.geometry.width, device=device)

    @torch.inference_mode()
    def forward() -> None:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            tokens = inputs
            for module, extra in zip(modules, arguments, strict=True):
                tokens = module(tokens, **extra)

    flops = teacher_flops(models.vit, models.geometry).blocks[:TIMED_BLOCKS]
    return batch * sum(flops) / median_seconds(forward, device)


@torch.inference_mode()
def _autoencoder_rate(meta: nn.Module, resolution: int, device: torch.device) -> float:
    cuda = device.type == "cuda"
    # convolutions reach the same rate on a quarter of the image
    size = resolution if cuda or resolution < 256 else resolution // 2
    batch = 8 if cuda else 1
    model = _materialised(meta, device).to(memory_format=torch.channels_last)
    pixels = torch.randn(batch, 3, size, size, device=device)
    seconds = median_seconds(lambda: encode(model, pixels), device)
    return batch * autoencoder_flops(meta, size) / seconds


def _student_rate(run: RunConfig, device: torch.device) -> float:
    """FLOP per second of a forward and backward pass of the denoising loss."""
    config, batch = run.student, 1
    if device.type == "cuda":
        batch = max(1, min(32, run.global_batch // run.workers.count))
    else:
        config = config.model_copy(update={"depth": min(TIMED_BLOCKS, config.size.depth)})
    with torch.device(device):
        student = make_student(config)
        x, t = torch.randn(batch, *config.latent_shape), torch.rand(batch)
        y = blank_condition(config, batch)
        given = {}
        if config.class_token is not None:
            given["class_token_BE"] = torch.randn(batch, config.class_token)
    dtype = precision_dtype(run.precision, device.type)

    def step() -> None:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            out = student(x, t, y, **given)
            loss = out.prediction.float().square().mean()
            if out.class_prediction is not None:
                loss = loss + out.class_prediction.float().square().mean()
        loss.backward()

    return batch * STEP * student_flops(config) / median_seconds(step, device)


def _materialised(meta: nn.Module, device: torch.device) -> nn.Module:
    """Copy of a meta module on ``device``, filled with small random numbers."""
    module = copy.deepcopy(meta).to_empty(device=device).eval().requires_grad_(False)
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.is_floating_point():
            tensor.normal_(0, 0.02)
    return module
