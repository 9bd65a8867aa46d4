"""An .npz file of images that never lie in memory together.

`np.load` opens it without pickle, and ADM's evaluator reads ``arr_0`` as it is.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy

from pipeline.archive import ABOUT

IMAGES, LABELS = "arr_0", "labels"


def npy_header(shape: tuple[int, ...]) -> bytes:
    """The beginning of a .npy file of uint8 numbers, which then follow in C order."""
    file = io.BytesIO()
    npy.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return file.getvalue()


def npy_bytes(array: np.ndarray[Any, Any]) -> bytes:
    """A whole .npy file."""
    file = io.BytesIO()
    npy.write_array(file, array, allow_pickle=False)
    return file.getvalue()


def write_npz(
    path: Path,
    shape: tuple[int, int, int, int],
    pieces: Iterable[bytes],
    labels: np.ndarray[Any, Any],
    about: dict[str, Any],
) -> None:
    """Write images (N, R, R, 3) whose bytes come in ``pieces``, int64 labels (N,) and a JSON text.

    Equal images make equal files. Raises ``ValueError`` where the pieces are more or less.
    """
    # stored, not compressed: pictures do not shrink, and the evaluator reads the bytes in place
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        left = int(np.prod(shape, dtype=np.int64))
        with archive.open(_entry(IMAGES), "w", force_zip64=True) as member:
            member.write(npy_header(shape))
            for piece in pieces:
                member.write(piece)
                left -= len(piece)
        if left:
            raise ValueError(f"images of shape {shape} lack {left} bytes")
        archive.writestr(_entry(LABELS), npy_bytes(labels.astype(np.int64)))
        archive.writestr(_entry(ABOUT), npy_bytes(np.array(json.dumps(about))))


def _entry(name: str) -> zipfile.ZipInfo:
    """Without the time of day, which would make every file another one."""
    return zipfile.ZipInfo(f"{name}.npy")
