"""Conversion of one image of a stream to tar members and back, without a store."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from pipeline.store.arrays import (
    StoredArray,
    empty_batch,
    npy_member,
    read_npy_member,
    stream_parts,
)
from pipeline.store.codecs import decode_column
from pipeline.store.tar_writer import BLOCK
from schemas.streams import Column


def write_members(
    parts: Mapping[str, StoredArray], arrays: Mapping[str, Tensor]
) -> dict[str, bytes]:
    """Tar members of one image's arrays (1, ...)."""
    return {name: npy_member(part, arrays[name][0].numpy()) for name, part in parts.items()}


def read_members(
    parts: Mapping[str, StoredArray], members: Mapping[str, bytes]
) -> dict[str, Tensor]:
    """Arrays (1, ...) of one image, decoded as by the reader."""
    batch = {}
    for name, part in parts.items():
        out = empty_batch(part, 1)
        out[0] = read_npy_member(part, members[name])
        batch[name] = torch.from_numpy(out)
    return batch


def decode_all(columns: Mapping[str, Column], batch: Mapping[str, Tensor]) -> list[Tensor]:
    return [decode_column(name, column, batch) for name, column in columns.items()]


def tar_bytes(member: bytes) -> int:
    return BLOCK * (1 - -len(member) // BLOCK)


def latent_bytes(resolution: int) -> int:
    """Bytes in a tar of the mean, std and label of an image's latent."""
    shape = (4, resolution // 8, resolution // 8)
    latent = Column(shape=shape, codec="float16")
    parts = stream_parts({"mean": latent, "std": latent, "label": Column(shape=(), codec="int64")})
    return sum(
        tar_bytes(npy_member(part, np.zeros(part.shape, part.dtype))) for part in parts.values()
    )
