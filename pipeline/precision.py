"""Arithmetic of the networks: the dtype that 'auto' stands for, TF32, autocast."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor

from schemas.errors import UserError
from schemas.extract import Precision
from schemas.sample import Arithmetic


def choose_precision(option: Literal["auto"] | Precision, device: str) -> Precision:
    """Precision of teacher and training on the device type ``device``; 'auto' is bfloat16 on GPUs
    and float32 on CPUs. Raises ``UserError`` for float16 on a CPU."""
    if option == "auto":
        return "bfloat16" if device == "cuda" else "float32"
    if device == "cpu" and option == "float16":
        raise UserError("--precision float16 needs a GPU; use bfloat16 or float32 on CPU")
    return option


def precision_dtype(option: Literal["auto"] | Precision, device: str) -> torch.dtype:
    """The torch dtype of ``choose_precision``; float32 means no autocast."""
    dtype: torch.dtype = getattr(torch, choose_precision(option, device))
    return dtype


def choose_device(option: Literal["auto", "cpu", "cuda"]) -> Literal["cpu", "cuda"]:
    """Device type for the value of ``--device``; 'auto' is 'cuda' where a GPU is available. Raises
    ``UserError`` for 'cuda' without a GPU."""
    available = torch.cuda.is_available()
    if option == "cuda" and not available:
        raise UserError("--device cuda: this machine has no GPU that torch can use")
    return "cuda" if available and option != "cpu" else "cpu"


def choose_arithmetic(option: Literal["auto"] | Arithmetic, device: str) -> Arithmetic:
    """Arithmetic of sampling on the device type ``device``; 'auto' is TF32 on GPUs and float32 on
    CPUs. Raises ``UserError`` for TF32 or float16 on a CPU."""
    if option == "auto":
        return "tf32" if device == "cuda" else "float32"
    if device == "cpu" and option in ("tf32", "float16"):
        raise UserError(f"--precision {option} needs a GPU; use bfloat16 or float32 on CPU")
    return option


def autocast_dtype(precision: Arithmetic) -> torch.dtype:
    """Autocast dtype of the student's forward pass; float32 means no autocast."""
    dtype: torch.dtype = getattr(torch, "float32" if precision == "tf32" else precision)
    return dtype


@contextmanager
def arithmetic(precision: Arithmetic) -> Iterator[None]:
    """Enable or disable TF32 for float32 products on GPUs inside; restore the setting at exit."""
    matmul, convolution = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, convolution.allow_tf32
    matmul.allow_tf32 = convolution.allow_tf32 = precision == "tf32"
    try:
        yield
    finally:
        matmul.allow_tf32, convolution.allow_tf32 = before


def check_finite(state: Mapping[str, Tensor], where: str) -> None:
    """Raises ``UserError`` naming a weight from ``where`` that is not finite."""
    for name, tensor in state.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            count = int((~tensor.isfinite()).sum())
            raise UserError(
                f"{where}: {count} of {tensor.numel()} numbers of {name} are not finite; use "
                "weights from before the training diverged"
            )


def is_finite(tensor: Tensor) -> Tensor:
    """If all numbers are finite: bool, on the device, read in one pass (``isfinite`` takes four).
    The extremes of numbers with a NaN among them are NaN."""
    if not tensor.numel() or not tensor.is_floating_point():
        return torch.ones((), dtype=torch.bool, device=tensor.device)
    return torch.stack(torch.aminmax(tensor)).isfinite().all()


def use_deterministic_kernels() -> None:
    """Restrict torch, in this process, to GPU kernels whose results are equal in every run.

    Attention is flash or plain, because the backward passes of the other kernels add in any order.
    Inductor does not choose kernels by their time, because another choice is another order of sums.
    """
    from torch._inductor import config as inductor  # takes seconds

    # read by cuBLAS when it is first used; another value makes it choose workspaces at random
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    torch.backends.cuda.enable_cudnn_sdp(False)
    if hasattr(inductor, "deterministic"):
        inductor.deterministic = True
