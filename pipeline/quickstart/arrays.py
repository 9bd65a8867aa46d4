"""Data sets that are distributed as arrays: CIFAR-10 and -100 (pickled and binary), MNIST and those
in its format (IDX)."""

from __future__ import annotations

import gzip
import io
import pickle
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from pipeline.cli.progress import progress_bar
from pipeline.storage.files import open_url, read_bytes, redact
from schemas.errors import UserError, plain_text

ARRAY_FILES = re.compile(
    r"data_batch_\d+(\.bin)?|test_batch(\.bin)?|batches\.meta(\.txt)?|train(\.bin)?|test(\.bin)?"
    r"|meta|(fine|coarse)_label_names\.txt"
    r"|.*-(images|labels)[-.]idx[13]-ubyte(\.gz)?"
)
"""Names of files with images, labels or names of classes."""
CIFAR_SIDE = 32
SAFE = {
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("_codecs", "encode"),
}
"""All that the pickles of CIFAR name; anything else might run code."""


class Batch(NamedTuple):
    """Images of one file."""

    pixels: np.ndarray
    """uint8 (N, H, W) or (N, H, W, 3)."""
    labels: np.ndarray
    """int64 (N,)."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in SAFE:
            raise pickle.UnpicklingError(f"it holds a {module}.{name}: no code is run")
        return super().find_class(module, name)


def write_arrays(source: str, paths: Sequence[str], folder: Path) -> None:
    """Write the training images below ``source`` as ``folder/CLASS/NUMBER.png``. Raises
    ``UserError``."""
    files = {path.rpartition("/")[2]: path for path in paths}
    files = {
        name: path
        for name, path in files.items()
        if name.removesuffix(".gz") not in files or name.removesuffix(".gz") == name
    }

    def read(name: str) -> bytes:
        filesystem, root = open_url(source, what="--source")
        return read_bytes(filesystem, f"{root}/{files[name]}")

    try:
        names = _class_names(files, read)
        number = 0
        for batch in progress_bar(list(_batches(files, read)), unit="file", desc="unpack"):
            for pixels, label in zip(batch.pixels, batch.labels.tolist(), strict=True):
                known = 0 <= label < len(names)
                place = folder / (names[label] if known else f"{label:03d}")
                place.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(place / f"{number:06d}.png", compress_level=1)
                number += 1
    except UserError:
        raise
    except Exception as error:  # unpickling damaged files raises any type
        reason = plain_text(str(error))[:200] or type(error).__name__
        raise UserError(f"--source '{redact(source)}' cannot be unpacked ({reason})") from None
    if not number:
        raise UserError(f"--source '{redact(source)}' has no training images")


def _batches(files: dict[str, str], read: Any) -> Iterator[Batch]:
    for name in sorted(files):
        if re.fullmatch(r"data_batch_\d+|train", name):
            yield _pickled(read(name))
        elif re.fullmatch(r"data_batch_\d+\.bin", name):
            yield _binary(read(name), labels=1)
        elif name == "train.bin":
            yield _binary(read(name), labels=2)
        elif re.match(r".*train.*-images[-.]idx3", name):
            other = name.replace("images", "labels").replace("idx3", "idx1")
            plain = other.removesuffix(".gz")
            other = next((n for n in (plain, f"{plain}.gz") if n in files), "")
            if not other:
                raise UserError(f"'{files[name]}' has no labels beside it: expected {plain}")
            yield Batch(_idx(read(name)), _idx(read(other)).astype(np.int64))


def _pickled(data: bytes) -> Batch:
    values = _Unpickler(io.BytesIO(data), encoding="bytes").load()
    labels = values[b"fine_labels"] if b"fine_labels" in values else values[b"labels"]
    return Batch(_planes(values[b"data"]), np.asarray(labels, np.int64))


def _binary(data: bytes, labels: int) -> Batch:
    rows = np.frombuffer(data, np.uint8).reshape(-1, labels + 3 * CIFAR_SIDE**2)
    return Batch(_planes(rows[:, labels:]), rows[:, labels - 1].astype(np.int64))


def _planes(rows: np.ndarray) -> np.ndarray:
    """Rows of 3072 numbers, plane after plane, as (N, 32, 32, 3)."""
    planes = rows.astype(np.uint8).reshape(-1, 3, CIFAR_SIDE, CIFAR_SIDE)
    return np.ascontiguousarray(planes.transpose(0, 2, 3, 1))


def _idx(data: bytes) -> np.ndarray:
    """The array of bytes in an IDX file, compressed or not."""
    data = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
    kind, dimensions = data[2], data[3]
    if data[:2] != b"\0\0" or kind != 8 or not 1 <= dimensions <= 3:
        raise UserError("an IDX file of other values than bytes")
    shape = np.frombuffer(data, ">u4", dimensions, 4).astype(np.int64)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * dimensions).reshape(shape)


def _class_names(files: dict[str, str], read: Any) -> list[str]:
    """Names of the classes, safe as names of folders; none where no file has them."""
    names: list[str] = []
    for name in ("batches.meta", "meta"):
        if name in files:
            values = _Unpickler(io.BytesIO(read(name)), encoding="bytes").load()
            key = b"fine_label_names" if b"fine_label_names" in values else b"label_names"
            names = [str(text.decode()) for text in values[key]]
    for name in ("batches.meta.txt", "fine_label_names.txt"):
        if name in files:
            names = read(name).decode().split()
    return [re.sub(r"[^\w -]", "_", name).strip(" ") or str(n) for n, name in enumerate(names)]
