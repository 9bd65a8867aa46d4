"""Noise that threads draw ahead: the numbers of a generator made for each image and draw."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

from pipeline.randomness import NormalDraws, Purpose, generator
from pipeline.sampling.noise import AHEAD, NoiseAhead

CPU = torch.device("cpu")
SHAPES = [(4, 3, 3), (5,)]


def test_numbers_are_those_of_a_new_generator_for_each_image_and_draw() -> None:
    with NoiseAhead(7, range(3, 8), SHAPES, CPU, count=AHEAD + 4) as noise:
        for number in range(AHEAD + 4):
            drawn = noise()
            for place, image in enumerate(range(3, 8)):
                rng = generator(Purpose.SAMPLING, 7, image, number)
                for tensor, shape in zip(drawn, SHAPES, strict=True):
                    expected = rng.standard_normal(shape, dtype=np.float32)
                    assert np.array_equal(tensor[place].numpy(), expected)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 1000])
def test_nothing_is_left_over_from_another_index(size: int) -> None:
    """Philox makes four numbers at a time and splits each of them into two of 32 bits."""
    draws = NormalDraws(Purpose.SAMPLING, 1 << 70)
    for index in ((0, 0), (5, 1), (0, 0), (1 << 40, 2)):
        out = np.empty(size, np.float32)
        draws.fill([out], *index)
        expected = generator(Purpose.SAMPLING, 1 << 70, *index)
        assert np.array_equal(out, expected.standard_normal(size, dtype=np.float32))
    with pytest.raises(ValueError, match="at most three"):
        draws.fill([], 1, 2, 3, 4)


def test_the_threads_end_where_the_network_raises() -> None:
    noise = NoiseAhead(0, range(2), SHAPES, CPU, count=9)
    with pytest.raises(RuntimeError, match="network"), noise:
        raise RuntimeError("network")
    assert not [t for t in threading.enumerate() if t.name.startswith("sampling-noise")]


def test_an_error_of_a_thread_is_raised_by_the_caller() -> None:
    with NoiseAhead(0, range(2), [(2,), (3,)], CPU, count=9) as noise:
        noise._seed = None  # type: ignore[assignment]
        with pytest.raises(TypeError):
            all(noise() for _ in range(9))
