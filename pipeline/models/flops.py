"""FLOPs of one image through a student, counted on the meta device, and peak rates of GPUs.

A multiply and an add are two FLOPs. Matrix products, including those of attention, and convolutions
are counted; norms, activations, softmax and the optimizer are not. A backward pass is twice its
forward pass, so a training step is three.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from pipeline.models.factory import blank_condition, make_student
from schemas.student import StudentConfig

STEP = 3  # forward and backward
PEAK_TFLOPS = {
    "H100 PCIe": 756,
    "H100 NVL": 835,
    "H100": 989,
    "H200": 989,
    "H800": 989,
    "GH200": 989,
    "B200": 2250,
    "A100": 312,
    "A800": 312,
    "L40S": 362,
    "L4": 121,
    "A10G": 70,
    "A10": 125,
    "4090": 165,
    "3090": 71,
    "V100": 125,
}
"""Dense bfloat16 (V100: float16) TFLOP/s of the data sheets, by part of the device name. The first
match is used."""


@torch.no_grad()
def count(call: Callable[[], Any]) -> tuple[Any, int]:
    """Result of ``call`` and its FLOPs."""
    with FlopCounterMode(display=False) as counter:
        result = call()
    return result, int(counter.get_total_flops())


@lru_cache(maxsize=64)  # counting takes as long as several steps of a small student
def student_flops(config: StudentConfig) -> int:
    """Forward FLOPs of one image, extrapolated from one and two blocks, which are equal."""
    one, two = (_student(config.model_copy(update={"depth": depth})) for depth in (1, 2))
    return one + (config.size.depth - 1) * (two - one)


def tapped_flops(config: StudentConfig, heads: int) -> int:
    """FLOPs of the logits of the first ``heads`` heads of one tapped block."""
    rows, columns = config.grid
    return logits_flops(heads, rows * columns, config.size.width // config.size.heads)


def logits_flops(heads: int, tokens: int, head_width: int) -> int:
    """FLOPs of the attention logits of one layer."""
    return 2 * heads * tokens**2 * head_width


def peak_tflops(device_name: str) -> float | None:
    """Dense peak from the data sheet; None for an unlisted device."""
    return next((peak for name, peak in PEAK_TFLOPS.items() if name in device_name), None)


def _student(config: StudentConfig) -> int:
    with torch.device("meta"):
        student = make_student(config)
        x, t = torch.empty(1, *config.latent_shape), torch.empty(1)
        y = blank_condition(config, 1)
        given = {}
        if config.class_token is not None:
            given["class_token_BE"] = torch.empty(1, config.class_token)
        return count(lambda: student(x, t, y, **given))[1]
