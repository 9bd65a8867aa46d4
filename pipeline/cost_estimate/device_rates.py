"""What the device at hand sustains: a few batches, timed.

Random numbers stand in for weights and images: only shapes decide how long a product takes. Where a
whole network would take long (on CPUs) or does not fit, two of its equal blocks are timed and the
rest follows from FLOPs.
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

from pipeline.cost_estimate.costs import TERA, Rates
from pipeline.cost_estimate.flops import TeacherFlops, autoencoder_flops
from pipeline.cost_estimate.meta_models import Drafts, encode
from pipeline.datasets.crop import decode_crop
from pipeline.models import make_student
from pipeline.models.flops import STEP, student_flops
from pipeline.precision import _autocast_dtype
from pipeline.teachers.vit import block_arguments
from schemas.extract import ExtractConfig
from schemas.run import RunConfig

SECONDS = 1.5  # spent on each network, at most, after its warm-up
REPEATS = 7
FEW_BLOCKS = 2
DECODERS = 8  # decoding threads that an encoder beside a GPU has, at most
MEMORY_SHARE = 0.8  # of what is free
ASSUMED_TFLOPS = 200.0  # what an H100 sustains in a transformer, in bfloat16
Basis = Literal["measured", "given", "assumed"]


@dataclass(frozen=True)
class Device:
    """What a worker has, and how it was timed."""

    name: str
    kind: Literal["cuda", "cpu", "given"]
    cores: int
    """Arithmetic threads of a CPU; of a GPU, its decoding threads."""
    rates: Rates
    basis: Basis
    """'given' by an option; 'assumed' where this machine has no GPU."""
    estimated: bool = False
    """The teacher does not fit: its FLOPs are costed at the rate of two of its blocks."""

    @property
    def teacher_basis(self) -> str:
        """Where the teacher's rate comes from."""
        return "estimated" if self.estimated else self.basis


def given_device(tflops: float, autoencoder_tflops: float | None, resolution: int) -> Device:
    """A device that is not at hand; only decoding is timed, on a core of this machine."""
    rates = _rates_of(tflops, autoencoder_tflops, resolution)
    return Device(f"a device of {tflops:g} TFLOP/s", "given", DECODERS, rates, "given")


def assumed_gpu(autoencoder_tflops: float | None, resolution: int) -> Device:
    """What a plan is for where nothing was said and no GPU is there."""
    rates = _rates_of(ASSUMED_TFLOPS, autoencoder_tflops, resolution)
    return Device("an assumed GPU", "given", DECODERS, rates, "assumed")


def _rates_of(tflops: float, autoencoder_tflops: float | None, resolution: int) -> Rates:
    rate = tflops * TERA
    return Rates(
        teacher=rate,
        autoencoder=rate / 10 if autoencoder_tflops is None else autoencoder_tflops * TERA,
        student=rate,
        decode_seconds=decode_seconds(resolution) / DECODERS,
        decode_beside=True,
    )


def measure_device(
    config: ExtractConfig,
    run: RunConfig,
    drafts: Drafts,
    flops: TeacherFlops,
    autoencoder_tflops: float | None = None,
    *,
    gpu: bool,
) -> Device:
    """Time this machine's GPU, or its CPU with all of torch's threads."""
    device = torch.device("cuda" if gpu else "cpu")
    cuda = device.type == "cuda"
    cores = min(DECODERS, os.cpu_count() or 1) if cuda else torch.get_num_threads()
    batch = config.batch_size if cuda else 2
    fits = _teacher_bytes(drafts, flops, config.batch_size) < MEMORY_SHARE * _free_memory(device)
    blocks = drafts.geometry.depth if cuda and fits else FEW_BLOCKS
    teacher_dtype = _autocast_dtype(config.precision, device)
    autoencoder = (
        _autoencoder_rate(drafts.autoencoder, config.resolution, device)
        if autoencoder_tflops is None
        else autoencoder_tflops * TERA
    )
    rates = Rates(
        teacher=_teacher_rate(drafts, flops, device, teacher_dtype, batch, blocks),
        autoencoder=autoencoder,
        student=_student_rate(run, device),
        decode_seconds=decode_seconds(config.resolution) / cores,
        decode_beside=cuda,
    )
    name = torch.cuda.get_device_name() if cuda else f"this CPU, {cores} threads"
    return Device(name, "cuda" if cuda else "cpu", cores, rates, "measured", estimated=not fits)


def median_seconds(call: Callable[[], Any], device: torch.device, limit: float = SECONDS) -> float:
    """Median time of ``call`` after a warm-up, of as many calls as ``limit`` seconds allow."""
    cuda = device.type == "cuda"

    def once() -> float:
        began = time.perf_counter()
        call()
        if cuda:
            torch.cuda.synchronize(device)
        return time.perf_counter() - began

    for _ in range(3 if cuda else 1):
        once()
    times = [once()]
    while len(times) < REPEATS and sum(times) < limit:
        times.append(once())
    return statistics.median(times)


def decode_seconds(resolution: int) -> float:
    """One thread, one JPEG of ImageNet's usual 500 x 375 pixels, cropped to ``resolution``."""
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (47, 63, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    coarse.resize((500, 375), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=95)
    data = buffer.getvalue()
    return median_seconds(lambda: decode_crop(data, resolution), torch.device("cpu"), limit=0.5)


def _teacher_rate(
    drafts: Drafts,
    flops: TeacherFlops,
    device: torch.device,
    dtype: torch.dtype,
    batch: int,
    count: int,
) -> float:
    geometry = drafts.geometry
    blocks = [_made_real(block, device) for block in drafts.vit.blocks[:count]]
    arguments = [
        {name: _random(value.shape, device) for name, value in extra.items()}
        for extra in block_arguments(drafts.vit)[:count]
    ]
    entering = _random((batch, geometry.tokens, geometry.width), device)

    @torch.inference_mode()
    def forward() -> None:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            tokens = entering
            for block, extra in zip(blocks, arguments, strict=True):
                tokens = block(tokens, **extra)

    return batch * sum(flops.blocks[:count]) / median_seconds(forward, device)


@torch.inference_mode()
def _autoencoder_rate(draft: nn.Module, resolution: int, device: torch.device) -> float:
    cuda = device.type == "cuda"
    # convolutions run as fast per FLOP on a quarter of the image
    size = resolution if cuda or resolution < 256 else resolution // 2
    batch = 8 if cuda else 1
    model = _made_real(draft, device).to(memory_format=torch.channels_last)
    pixels = _random((batch, 3, size, size), device)
    seconds = median_seconds(lambda: encode(model, pixels), device)
    return batch * autoencoder_flops(draft, size) / seconds


def _student_rate(run: RunConfig, device: torch.device) -> float:
    """Forward and backward of the denoising loss."""
    cuda = device.type == "cuda"
    config = run.student
    batch = max(1, min(32, run.global_batch // run.workers.count)) if cuda else 1
    if not cuda:
        config = config.model_copy(update={"depth": min(FEW_BLOCKS, config.size.depth)})
    with torch.device(device):
        student = make_student(config)
    x = _random((batch, *config.latent_shape), device)
    t = torch.rand(batch, device=device)
    y = torch.zeros(batch, dtype=torch.long, device=device)
    dtype = _autocast_dtype(run.precision, device)

    def step() -> None:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss = student(x, t, y).prediction.float().square().mean()
        loss.backward()

    return batch * STEP * student_flops(config) / median_seconds(step, device)


def _made_real(draft: nn.Module, device: torch.device) -> nn.Module:
    """A copy of a module of the meta device, filled with small random numbers."""
    module = copy.deepcopy(draft).to_empty(device=device).eval().requires_grad_(False)
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.is_floating_point():
                tensor.normal_(0, 0.02)
    return module


def _random(shape: tuple[int, ...] | torch.Size, device: torch.device) -> torch.Tensor:
    return torch.randn(shape, device=device)


def _teacher_bytes(drafts: Drafts, flops: TeacherFlops, batch: int) -> int:
    """Weights in float32 and the widest tensors of one block."""
    geometry = drafts.geometry
    return 4 * (flops.weights() + batch * geometry.tokens * geometry.width * 12)


def _free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        with open("/proc/meminfo") as lines:
            kilobytes = next(line.split()[1] for line in lines if line.startswith("MemAvailable"))
        return 1024 * int(kilobytes)
    except (OSError, StopIteration):  # not Linux
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
