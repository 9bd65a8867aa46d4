"""Prefetched noise and batches equal those that are not prefetched."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.train.device_transfer import DevicePrefetcher
from pipeline.train.noise import NoisePrefetcher, SampleNoise, draw

CPU = torch.device("cpu")
SHAPE = (2, 3, 3)


@pytest.fixture
def ahead() -> Iterator[NoisePrefetcher]:
    draws = NoisePrefetcher(7, SHAPE, 0.5, CPU)
    yield draws
    draws.close()


def same(one: SampleNoise, other: SampleNoise) -> bool:
    assert one.class_noise is None
    assert other.class_noise is None
    return all(torch.equal(a, b) for a, b in zip(one[:-1], other[:-1], strict=True))


def test_expected_draws_are_made_once_by_the_thread(
    ahead: NoisePrefetcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[tuple[str, int]] = []

    def recording(seed: int, positions: np.ndarray, *rest: Any, **more: Any) -> SampleNoise:
        made.append((threading.current_thread().name, int(positions[0])))
        return draw(seed, positions, *rest, **more)

    monkeypatch.setattr("pipeline.train.noise.draw", recording)
    here = threading.current_thread().name
    for step in range(3):
        positions = np.arange(5 * step, 5 * step + 5)
        assert same(ahead(positions), draw(7, positions, SHAPE, 0.5))
        ahead.expect(positions + 5)
    ahead.close()
    assert made[0] == (here, 0)
    assert made[1:3] == [("draws_0", 5), ("draws_0", 10)]


def test_unexpected_draws_are_made_when_requested(ahead: NoisePrefetcher) -> None:
    expected, other = np.arange(5, 10), np.array([3, 99])
    ahead.expect(expected)
    assert same(ahead(other), draw(7, other, SHAPE, 0.5))
    assert same(ahead(expected), draw(7, expected, SHAPE, 0.5))


def test_an_error_in_the_thread_is_raised_when_the_draws_are_requested(
    ahead: NoisePrefetcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise MemoryError("no memory for the draws")

    monkeypatch.setattr("pipeline.train.noise.draw", fails)
    ahead.expect(np.arange(4))
    with pytest.raises(MemoryError, match="no memory"):
        ahead(np.arange(4))


def test_nothing_is_copied_on_a_cpu() -> None:
    tensor = torch.arange(6).reshape(2, 3)
    assert DevicePrefetcher(CPU)({"a": tensor})["a"].data_ptr() == tensor.data_ptr()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_copies_during_a_computation_are_complete() -> None:
    """Many large copies in a row, whose memory is freed and reused at once."""
    device = torch.device("cuda")
    feed, ahead = DevicePrefetcher(device), NoisePrefetcher(7, (4, 32, 32), 0.5, device)
    work = torch.randn(4096, 4096, device=device)
    sums, expected = [], []
    for step in range(20):
        positions = np.arange(64 * step, 64 * step + 64)
        draws = ahead(positions)
        ahead.expect(positions + 64)
        expected.append(draw(7, positions, (4, 32, 32), 0.5).noise.double().sum().item())
        for _ in range(10):
            work = work @ work / 64
        copies = feed(draws._asdict())
        sums.append(copies["noise"].double().sum())
    ahead.close()
    assert [value.item() for value in sums] == pytest.approx(expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_arrays_of_a_batch_in_pinned_memory_arrive_complete() -> None:
    """The memory is released and filled again while copies are still queued."""
    feed = DevicePrefetcher(torch.device("cuda"))
    sums = []
    for step in range(40):
        batch = feed.allocate(64 << 20).reshape(4, -1)
        batch[:] = step
        for part in (batch[:1], batch[1:]):
            tensor = torch.from_numpy(part)
            assert tensor.is_pinned()
            sums.append((step, feed({"x": tensor})["x"]))
        del batch, part, tensor
    for step, copy in sums:
        assert int(copy.min()) == int(copy.max()) == step


def test_a_batch_for_a_cpu_is_in_ordinary_memory() -> None:
    memory = DevicePrefetcher(CPU).allocate(10)
    assert (memory.dtype, memory.shape) == (np.uint8, (10,))
    assert not torch.from_numpy(memory).is_pinned()
