"""Arithmetic of the networks: the dtype that 'auto' stands for, TF32, autocast."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch

from schemas.errors import UserError
from schemas.extract import ExtractConfig, Precision
from schemas.sample import Arithmetic


def choose_precision(config: ExtractConfig, device: str) -> Precision:
    """The arithmetic that 'auto' stands for."""
    if config.precision != "auto":
        if device == "cpu" and config.precision == "float16":
            raise UserError("--precision float16 needs a GPU; use bfloat16 or float32 on CPU")
        return config.precision
    return "bfloat16" if device == "cuda" else "float32"


def _autocast_dtype(precision: str, device: torch.device) -> torch.dtype:
    """What extraction and training make of 'auto'."""
    if precision == "auto":
        precision = "bfloat16" if device.type == "cuda" else "float32"
    dtype = getattr(torch, precision)
    assert isinstance(dtype, torch.dtype)
    return dtype


def choose_device(option: Literal["auto", "cpu", "cuda"]) -> Literal["cpu", "cuda"]:
    """Device type for the value of ``--device``; 'auto' is 'cuda' where a GPU is available. Raises
    ``UserError`` for 'cuda' without a GPU."""
    available = torch.cuda.is_available()
    if option == "cuda" and not available:
        raise UserError("--device cuda: this machine has no GPU that torch can use")
    return "cuda" if available and option != "cpu" else "cpu"


def choose_arithmetic(asked: Literal["auto"] | Arithmetic, device: str) -> Arithmetic:
    """What 'auto' stands for on 'cpu' or 'cuda'. Raises ``UserError`` where a device lacks it."""
    if asked == "auto":
        return "tf32" if device == "cuda" else "float32"
    if device == "cpu" and asked in ("tf32", "float16"):
        raise UserError(f"--precision {asked} needs a GPU; use bfloat16 or float32 on CPU")
    return asked


def autocast_dtype(precision: Arithmetic) -> torch.dtype:
    """Of the student's forward pass; float32 is no autocast."""
    dtype: torch.dtype = getattr(torch, "float32" if precision == "tf32" else precision)
    return dtype


@contextmanager
def arithmetic(precision: Arithmetic) -> Iterator[None]:
    """Products of float32 numbers on GPUs in TF32, or not, whatever was set before."""
    matmul, convolution = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, convolution.allow_tf32
    matmul.allow_tf32 = convolution.allow_tf32 = precision == "tf32"
    try:
        yield
    finally:
        matmul.allow_tf32, convolution.allow_tf32 = before
