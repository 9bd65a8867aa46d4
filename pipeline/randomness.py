"""Every random number as a pure function of integers.

Counter-based generators (Philox, doi 10.1145/2063384.2063405) make order, noise, timesteps and
label drops depend on their purpose and index only, not on the process or on earlier draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum

import numpy as np

WORD = 1 << 64


class Purpose(IntEnum):
    """Purpose of the random numbers. The values are part of the format: never renumber them."""

    SHARD_ORDER = 1
    SAMPLE_ORDER = 2
    TRAINING = 3
    SAMPLING = 4
    PROBE = 5
    LABELS = 6
    CAPTION = 8
    VALIDATION = 9
    CALIBRATION = 10


def generator(purpose: Purpose, seed: int, *index: int) -> np.random.Generator:
    """The generator that belongs to ``(purpose, seed, index)``; at most three index integers."""
    bits = np.random.Philox(key=[seed % WORD, int(purpose)], counter=_counter(index))
    return np.random.Generator(bits)


class NormalDraws:
    """Normal numbers of the generators of one purpose and seed, for one thread. Making a generator
    takes a fifth of the time of drawing a latent's noise; this one is moved to each index."""

    def __init__(self, purpose: Purpose, seed: int) -> None:
        self._bits = np.random.Philox(key=[seed % WORD, int(purpose)])
        self._start = self._bits.state
        self._generator = np.random.Generator(self._bits)

    def fill(self, arrays: Sequence[np.ndarray], *index: int) -> None:
        """Fill contiguous float32 arrays, in order, with the standard normal numbers of the
        generator of this index."""
        self._start["state"]["counter"] = np.array(_counter(index), np.uint64)
        self._bits.state = self._start  # no number is left over from another index
        for array in arrays:
            self._generator.standard_normal(dtype=np.float32, out=array)


def uniform_pairs(purpose: Purpose, seed: int, *index: np.ndarray) -> np.ndarray:
    """float64 (N, 2): for each of N indices, one int64 array (N,) for each of their integers (at
    most three, none negative), the numbers of ``generator(purpose, seed, *index).random(2)``, bit
    for bit, without a generator for each.

    Philox4x64-10 (doi 10.1145/2063384.2063405, section 4.3 with table 2's constants), whose first
    block belongs to the counter + 1; a double is the upper 53 bits of a word.
    """
    counter = np.zeros((4, len(index[0])), np.uint64)
    counter[0] = 1
    counter[1 : 1 + len(index)] = index
    even, odd = counter[::2], counter[1::2]
    # as the generator has it: numpy rounds the words of seeds outside int64
    start = np.random.Philox(key=[seed % WORD, int(purpose)]).state["state"]["key"]
    key = [int(word) for word in start]
    for _ in range(10):
        high, low = _multiply(even, PHILOX_FACTORS)
        even = high[::-1] ^ odd ^ np.array(key, np.uint64)[:, None]
        odd = low[::-1]
        key = [(word + step) % WORD for word, step in zip(key, PHILOX_STEPS, strict=True)]
    words = np.stack([even[0], odd[0]], 1)
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53


PHILOX_FACTORS = np.array([[0xD2E7470EE14C6C93], [0xCA5A826395121157]], np.uint64)
PHILOX_STEPS = (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)
LOW, HALF = np.uint64(0xFFFFFFFF), np.uint64(32)


def _multiply(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The upper and lower 64 bits of products of 64-bit integers."""
    a_low, a_high, b_low, b_high = a & LOW, a >> HALF, b & LOW, b >> HALF
    across = a_high * b_low
    middle = (a_low * b_low >> HALF) + (across & LOW) + a_low * b_high  # below 2^64
    return a_high * b_high + (across >> HALF) + (middle >> HALF), a * b


def _counter(index: Sequence[int]) -> list[int]:
    if len(index) > 3:
        raise ValueError("at most three index integers fit next to the draw counter")
    return [0, *(i % WORD for i in index), 0, 0, 0][:4]
