"""Order of codecs: re-encoding with a finer codec than the stored one would gain nothing."""

from __future__ import annotations

from pipeline.store.codecs import find_codec
from pipeline.store.codecs.base import STORED_AS_IS
from schemas.codecs import CodecName

INT8_LEVELS = range(16, 49)
"""Levels of 'tokens', 'rms' and 'heads' that int8 codecs may be equivalent to. Their step is a
127th of a vector's largest number, which is 3 (Gaussian) to 8 (channels of large values) times its
RMS; whether int8 or the 'faithful' set (20 to 26 levels) is finer depends on the teacher."""


def coarser_than(stored: CodecName, other: CodecName) -> bool:
    """True if ``stored`` has certainly dropped digits that ``other`` would keep.

    Floats may become any other floats: float32 holds all shorter ones exactly (and makes bfloat16,
    which numpy lacks, readable by any software); the two 16-bit ones are of equal size.
    """
    old, new = find_codec(stored), find_codec(other)
    if old.family == STORED_AS_IS:
        return False
    if new.family == STORED_AS_IS:
        return True
    if old.family == new.family:
        return new.levels > old.levels
    if old.family == "int8":
        return new.family != "sqrt" and new.levels > INT8_LEVELS[-1]
    return new.family == "int8" and old.family != "sqrt" and old.levels < INT8_LEVELS[0]
