"""The teacher's tail: the blocks after the cut, which training runs. Its weights are in the store,
so that training needs neither the hub nor the blocks before the cut."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from safetensors import SafetensorError
from safetensors.torch import load, save

from pipeline.storage.files import file_size, open_url, read_bytes, write_atomic
from pipeline.store import Store
from pipeline.store.layout import MANIFEST
from pipeline.teachers import Teacher
from pipeline.teachers.manifest_check import create_meta_teacher, tail_bytes, teacher_config
from pipeline.teachers.vit import tail_state
from schemas.errors import UserError
from schemas.extract import Cut
from schemas.networks import TeacherInfo, WeightsFile

MAX_HEADER = 1 << 20
"""Bytes of the header of a safetensors file."""


def tail_file(stream: str) -> str:
    """Name of the file of a stream's tail."""
    return f"{stream}_teacher_tail.safetensors"


def first_tail_block(cut: Cut, layers: Sequence[int]) -> int | None:
    """The first block that training runs; None for a cut after which none is left to run."""
    if cut == "image":
        return 0
    return layers[0] if cut == "activations" else None


def describe_tail(teacher: Teacher, stream: str, first_block: int) -> WeightsFile:
    """The file that ``save_tail`` writes, for a manifest that is written before it."""
    return _describe(_encode(teacher, first_block), stream)


def save_tail(teacher: Teacher, url: str, stream: str, first_block: int) -> WeightsFile:
    """Write the teacher's weights from ``first_block`` on into a store. The teacher may be a tail
    itself, if its first block is ``first_block`` or an earlier one."""
    return _write(_encode(teacher, first_block), url, stream)


def copy_tail(store: Store, stream: str, url: str, name: str) -> WeightsFile:
    """Copy the tail of a store's stream to the store at ``url``, for its stream ``name``. Raises
    ``UserError`` when it is missing or damaged."""
    check_tail(store, stream)
    return _write(_read(store, stream), url, name)


def describe_copy(store: Store, stream: str, name: str) -> WeightsFile:
    """The file that ``copy_tail`` writes. Raises ``UserError`` as that does."""
    check_tail(store, stream)
    return _describe(_read(store, stream), name)


def _encode(teacher: Teacher, first_block: int) -> bytes:
    state = tail_state(teacher.vit, first_block - teacher.first_block)
    return save({name: value.cpu().contiguous() for name, value in state.items()})


def _describe(data: bytes, stream: str) -> WeightsFile:
    digest = hashlib.sha256(data).hexdigest()
    return WeightsFile(file=tail_file(stream), bytes=len(data), sha256=digest)


def _write(data: bytes, url: str, stream: str) -> WeightsFile:
    filesystem, root = open_url(url, what="--store")
    info = _describe(data, stream)
    write_atomic(filesystem, f"{root}/{info.file}", data)
    return info


def check_tail(store: Store, stream: str) -> None:
    """Check a stream's tail without reading it. Raises ``UserError`` when the manifest lists no
    tail, declares an impossible teacher, or a size that is not that of the tail's blocks."""
    teacher, tail, first_block = _declared(store, stream)
    where = f"{store.shown_url}/{MANIFEST}: streams.{stream}"
    draft = create_meta_teacher(teacher, store.manifest.resolution, f"{where}.teacher")
    size = tail_bytes(draft, first_block)
    if not size <= tail.bytes <= size + MAX_HEADER:
        raise UserError(
            f"{where}.tail.bytes is {tail.bytes}; blocks {first_block} to {teacher.depth - 1} of "
            f"'{teacher.model}' take {size}"
        )


def load_tail(store: Store, stream: str, layers: Sequence[int]) -> Teacher:
    """The tail of a stream's teacher, with taps on ``layers``. Raises ``UserError`` when its
    weights are missing or not those of the extraction."""
    check_tail(store, stream)
    teacher, tail, first_block = _declared(store, stream)
    try:
        return Teacher(
            teacher_config(teacher),
            resolution=store.manifest.resolution,
            layers=layers,
            first_block=first_block,
            tail=load(_read(store, stream)),
        )
    except (ValueError, SafetensorError) as error:
        raise UserError(
            f"{store.shown_url}/{tail.file} does not hold blocks {first_block} to "
            f"{teacher.depth - 1} of '{teacher.model}': {str(error)[:200]}"
        ) from None


def _declared(store: Store, stream: str) -> tuple[TeacherInfo, WeightsFile, int]:
    """A stream's teacher, the file of its tail, and the tail's first block."""
    info = store.manifest.teacher_streams[stream]
    first_block = first_tail_block(info.cut, info.teacher.layers)
    if info.tail is None or first_block is None:
        raise UserError(f"store '{store.shown_url}' contains no weights of the teacher")
    return info.teacher, info.tail, first_block


def _read(store: Store, stream: str) -> bytes:
    _, tail, _ = _declared(store, stream)
    where = f"{store.shown_url}/{tail.file}"
    try:
        path = f"{store.root}/{tail.file}"
        has_size = file_size(store.filesystem, path) == tail.bytes  # bounds what is read
        data = read_bytes(store.filesystem, path) if has_size else b""
    except FileNotFoundError:
        raise UserError(f"{where} is missing: run the extraction again") from None
    if hashlib.sha256(data).hexdigest() != tail.sha256:
        raise UserError(f"{where} is damaged: its checksum is wrong; run the extraction again")
    return data
