"""Columns of a stream of captions, the texts in them, and the file of the null caption."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from pipeline.storage.files import read_at_most, write_atomic
from pipeline.store.codecs import find_codec
from schemas.codecs import CodecName, Lossless
from schemas.errors import UserError
from schemas.fields import TEXT
from schemas.networks import TextEncoderInfo, WeightsFile
from schemas.store import MAX_CAPTION_BYTES, Manifest
from schemas.streams import LENGTHS, MAX_CAPTIONS, Column, TextStream, caption_column

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.store.store import Store

SEPARATOR = b"\0"


def text_columns(
    info: TextEncoderInfo,
    codec: CodecName | None,
    *,
    captions: int,
    text_bytes: int | None,
    compress: bool = True,
) -> dict[str, Column]:
    """Columns of a stream of at most ``captions`` captions an image: embeddings of ``codec``, or
    token ids without one. ``text_bytes`` is the size of the longest ``pack_texts``, None where
    texts are unknown.

    Each caption has its own column, so that a visit reads one of them; the zeros of captions that
    an image does not have compress to almost nothing. Raises ``UserError``.
    """
    lossless: Lossless = "zstd" if compress else "none"
    if codec is None:
        column = Column(shape=(info.tokens,), codec="int64", lossless=lossless)
    else:
        found, shape = find_codec(codec), (info.tokens, info.width)
        try:
            found.arrays(shape)
        except ValueError as error:
            raise UserError(f"--text.codec {codec}: {error}") from None
        column = Column(shape=shape, codec=codec, lossless=found.lossless if compress else "none")
    columns = {caption_column(number): column for number in range(captions)}
    columns[LENGTHS] = Column(shape=(captions,), codec="int64")
    if text_bytes is not None:
        columns[TEXT] = Column(shape=(text_bytes,), codec="uint8", lossless=lossless)
    return columns


def pack_texts(captions: Sequence[str]) -> bytes:
    """Captions in UTF-8, separated by zeros."""
    return SEPARATOR.join(caption.encode() for caption in captions)


def unpack_texts(row: np.ndarray) -> list[str]:
    """The captions in a row of the column ``text``, uint8, padded with zeros."""
    data = row.tobytes().rstrip(SEPARATOR)
    return [part.decode(errors="replace") for part in data.split(SEPARATOR)] if data else []


def padded_texts(captions: Sequence[str], size: int) -> np.ndarray:
    """uint8 (size,): the inverse of ``unpack_texts``."""
    return np.frombuffer(pack_texts(captions).ljust(size, SEPARATOR), np.uint8)


def null_file(stream: str) -> str:
    """Name of the file of a stream's null caption."""
    return f"{stream}_null.safetensors"


def describe_null(data: bytes, stream: str) -> WeightsFile:
    """Entry of a manifest for the safetensors bytes of a null caption."""
    digest = hashlib.sha256(data).hexdigest()
    return WeightsFile(file=null_file(stream), bytes=len(data), sha256=digest)


def write_null(store: Store, stream: str, data: bytes) -> None:
    """Write the null caption's file into a store. Raises ``UserError`` where the manifest has
    another one."""
    file = store.manifest.text_streams[stream].null
    if describe_null(data, stream) != file:
        raise UserError(
            f"store '{store.shown_url}' was made with another null caption of stream '{stream}', "
            "and has lost it: use another --store"
        )
    write_atomic(store.filesystem, f"{store.root}/{file.file}", data)


def read_null(store: Store, stream: str) -> bytes:
    """The safetensors bytes of the null caption. Raises ``UserError`` when the file is missing or
    damaged."""
    file = store.manifest.text_streams[stream].null
    where = f"{store.shown_url}/{file.file}"
    try:
        data = read_at_most(store.filesystem, f"{store.root}/{file.file}", file.bytes + 1)
    except FileNotFoundError:
        raise UserError(f"{where} is missing: run the extraction again") from None
    if hashlib.sha256(data).hexdigest() != file.sha256:
        raise UserError(f"{where} is damaged: its checksum is wrong; run the extraction again")
    return data


def load_null(store: Store, stream: str) -> dict[str, Tensor]:
    """The null caption: ``tokens``, int64 (T,), and of a stream of embeddings ``embeddings``,
    float32 (T, D). Raises ``UserError``."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    info: TextStream = store.manifest.text_streams[stream]
    shape = (info.encoder.tokens, info.encoder.width)
    name, wanted = ("tokens", shape[:1]) if info.keeps == "tokens" else ("embeddings", shape)
    try:
        tensors = load(read_null(store, stream))
    except (SafetensorError, ValueError) as error:
        raise UserError(f"{store.shown_url}/{info.null.file}: {str(error)[:200]}") from None
    if name not in tensors or tuple(tensors[name].shape) != wanted:
        raise UserError(f"{store.shown_url}/{info.null.file} does not hold {name} of {wanted}")
    return tensors


def caption_lines(manifest: Manifest) -> Iterator[str]:
    """Counts of the captions of a store, as lines of text."""
    counts = manifest.dataset.captions
    if counts is not None:
        left_out = {
            "empty captions": counts.empty,
            f"captions beyond {MAX_CAPTIONS} of an image": counts.beyond_limit,
            "images without captions": counts.images_without,
            "captioned images that are missing": counts.without_images,
            f"ends of captions of more than {MAX_CAPTION_BYTES} bytes": counts.shortened,
        }
        parts = [f"{count} {what}" for what, count in left_out.items() if count]
        yield f"{counts.captions} captions" + (f"; left out: {', '.join(parts)}" if parts else "")
    for name, stream in manifest.text_streams.items():
        if stream.truncated:
            yield (
                f"{stream.truncated} captions of stream '{name}' were truncated to "
                f"{stream.encoder.tokens} tokens"
            )
