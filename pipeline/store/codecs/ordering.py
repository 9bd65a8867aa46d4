"""Which codec is finer than which: storing finely what was stored coarsely gains nothing."""

from __future__ import annotations

import re

from schemas.codecs import CodecName

PLAIN = {"float32", "float16", "bfloat16", "uint8", "int64"}

INT8_LIKE = range(16, 49)
"""What the int8 codecs are as fine as, on the scale of 'tokens', 'rms' and 'heads'. Their step is a
127th of a vector's largest number, which is 3 (Gaussian) to 8 (loud channels) times its root mean
square; which of them and the 'faithful' set (20 to 26) is finer depends on the teacher."""

CUBE_ROOT = 1000
"""What 'cbrt8' is as fine as, on the scale of 'sqrt', in divergence on the demo's maps."""


def is_finer(now: CodecName, was: CodecName) -> bool:
    """Whether ``now`` would keep digits that ``was`` has surely dropped already.

    Floats may become any other floats: float32 holds all of the shorter ones exactly (and bfloat16,
    which numpy does not know, can be read by anyone then); the two short ones are of equal size.
    """
    if was in PLAIN:
        return False
    if now in PLAIN:
        return True
    (family, fine), (old_family, old) = _scale(now), _scale(was)
    if family == old_family:
        return fine > old
    if old_family == "int8":
        return family != "sqrt" and fine > INT8_LIKE[-1]
    return family == "int8" and old_family != "sqrt" and old < INT8_LIKE[0]


def _scale(codec: CodecName) -> tuple[str, int]:
    if codec == "cbrt8":
        return "sqrt", CUBE_ROOT
    if codec.startswith("int8"):
        return "int8", 0  # its kinds are not ordered
    match = re.fullmatch(r"([a-z]+)(\d+)", codec)
    assert match is not None, codec
    return match[1], int(match[2])
