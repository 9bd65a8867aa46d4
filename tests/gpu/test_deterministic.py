"""compute.deterministic restricts a GPU's kernels, and changes nothing on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch._inductor import config as inductor

from pipeline.store import Store
from tests.gpu.fake_gpu import CUDA, FakeGpu, needs_cuda_build
from tests.gpu.steps import open_steps

CHANGES = {"compute": {"deterministic": True}}


@pytest.fixture(autouse=True)
def restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    before = getattr(inductor, "deterministic", None)
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cuda.enable_mem_efficient_sdp(True)
    torch.backends.cuda.enable_cudnn_sdp(True)
    if before is not None:
        inductor.deterministic = before


def kernels() -> tuple[bool, ...]:
    attention = torch.backends.cuda
    return (
        torch.are_deterministic_algorithms_enabled(),
        not attention.mem_efficient_sdp_enabled(),
        not attention.cudnn_sdp_enabled(),
        getattr(inductor, "deterministic", True),
    )


def test_on_a_cpu(stores: Callable[..., Store]) -> None:
    before = kernels()
    with open_steps(stores("maps"), torch.device("cpu"), CHANGES):
        assert kernels() == before
    assert before[:3] == (False, False, False)


@needs_cuda_build
def test_on_a_gpu(stores: Callable[..., Store]) -> None:
    with FakeGpu() as gpu, open_steps(stores("maps"), CUDA, CHANGES) as steps:
        assert kernels() == (True, True, True, True)
        gpu.waits.clear()
        steps.take(1)
    assert gpu.waits_inside("train_step") == gpu.races == []
