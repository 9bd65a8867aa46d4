"""Every random number as a pure function of integers.

Counter-based generators (Philox, doi 10.1145/2063384.2063405) make order, noise, timesteps and
label drops depend on their purpose and index only, not on the process or on earlier draws.
"""

from __future__ import annotations

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
    if len(index) > 3:
        raise ValueError("at most three index integers fit next to the draw counter")
    words = [0, *(i % WORD for i in index), 0, 0, 0][:4]
    bits = np.random.Philox(key=[seed % WORD, int(purpose)], counter=words)
    return np.random.Generator(bits)
