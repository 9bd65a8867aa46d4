"""Parse precomputed latents, and embeddings of captions, from the bytes of .npy files."""

from __future__ import annotations

import io
import math

import numpy as np

from pipeline.datasets.crop import BadImageError
from pipeline.storage.npz import read_npy_header

MAX_BYTES = 1 << 26
"""Limit of one file: twice the size of mean and std of 16 channels at 512 x 512 in float32."""
LOG_VARIANCES = (-30.0, 20.0)
MAX_LATENT = float(np.finfo(np.float16).max)  # latents are stored in float16


def parse_moments(data: bytes, *, log_variance: bool = False) -> np.ndarray:
    """A .npy file to float32 (2C, h, w), C channels of the mean, then of the std; with
    ``log_variance`` the file has the logarithm of the variance in its place, which is clamped to
    -30 to 20 as in diffusers and HASTE.

    Nothing is unpickled, and no memory is allocated only because the header claims a size. Raises
    ``BadImageError`` for other arrays and for values that are not mean and std.
    """
    moments = parse_array(data)
    shape = moments.shape
    if len(shape) != 3 or shape[0] % 2 or min(shape) < 1:
        raise BadImageError(f"has shape {shape}; expected (2 x channels, rows, columns)")
    spread = moments[shape[0] // 2 :]
    if log_variance:
        spread[:] = np.exp(0.5 * np.clip(spread, *LOG_VARIANCES))
        return moments
    if (spread < 0).any():
        raise BadImageError(
            "the second half of its channels has negative values: not standard deviations "
            "(log variances?)"
        )
    return moments


def parse_array(data: bytes) -> np.ndarray:
    """A .npy file of floats to float32; a first axis of 1 before three others is dropped. Raises
    ``BadImageError`` for other arrays and for numbers that are not finite in float16."""
    stream = io.BytesIO(data)
    try:
        shape, dtype, fortran, offset = read_npy_header(stream)
    except ValueError:
        raise BadImageError("is not a .npy file, or damaged") from None
    if dtype.hasobject:
        raise BadImageError("holds pickled objects, which are not read")
    if dtype.kind != "f" or dtype.itemsize not in (2, 4):
        raise BadImageError(f"holds {dtype} numbers; expected float32 or float16")
    if len(shape) == 4 and shape[0] == 1:  # a batch of one, which REPA's trainer accepts, too
        shape = shape[1:]
    if min(shape, default=1) < 0:
        raise BadImageError(f"has shape {shape}; sizes are not negative")
    promised, found = math.prod(shape) * dtype.itemsize, len(data) - offset
    if promised != found:
        raise BadImageError(f"holds {found} bytes of numbers, its header promises {promised}")
    flat = np.frombuffer(data, dtype, offset=offset)
    values = flat.reshape(shape, order="F" if fortran else "C").astype(np.float32, order="C")
    if not (np.abs(values) <= MAX_LATENT).all():  # false for NaN too
        raise BadImageError(f"a value is not finite or above {MAX_LATENT:g}, float16's largest")
    return values
