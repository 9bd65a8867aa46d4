"""The part of the teacher that training runs: its weights lie in the store, so that training needs
neither the hub nor the part before the cut."""

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
from schemas.store import TeacherInfo, WeightsFile

MAX_HEADER = 1 << 20
"""More bytes than the header of a file of weights takes up."""


def tail_file(stream: str) -> str:
    """Name of the file that holds the weights of a stream's tail."""
    return f"{stream}_teacher_tail.safetensors"


def first_tail_block(cut: Cut, layers: Sequence[int]) -> int | None:
    """The teacher's block with which training begins; None where the cut leaves it nothing."""
    if cut == "image":
        return 0
    return layers[0] if cut == "activations" else None


def save_tail(teacher: Teacher, url: str, stream: str, first_block: int) -> WeightsFile:
    """Write the teacher's weights from ``first_block`` on beside the shards of a store. The teacher
    may be a tail itself, which begins there or before."""
    state = tail_state(teacher.vit, first_block - teacher.first_block)
    data = save({name: value.cpu().contiguous() for name, value in state.items()})
    return _write(data, url, stream)


def copy_tail(store: Store, stream: str, url: str, name: str) -> WeightsFile:
    """Put the tail of a store's stream beside the shards of another, for its stream ``name``.
    Raises ``UserError`` where it is missing or damaged."""
    check_tail(store, stream)
    return _write(_read(store, stream), url, name)


def _write(data: bytes, url: str, stream: str) -> WeightsFile:
    filesystem, root = open_url(url, what="--store")
    file = tail_file(stream)
    write_atomic(filesystem, f"{root}/{file}", data)
    return WeightsFile(file=file, bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


def check_tail(store: Store, stream: str) -> None:
    """What can be told of a stream's tail without reading it: that the store carries one, of a
    teacher that is what the manifest says, as large as its blocks. Raises ``UserError``."""
    about, tail, first_block = _declared(store, stream)
    where = f"{store.shown_url}/{MANIFEST}: streams.{stream}"
    draft = create_meta_teacher(about, store.manifest.resolution, f"{where}.teacher")
    size = tail_bytes(draft, first_block)
    if not size <= tail.bytes <= size + MAX_HEADER:
        raise UserError(
            f"{where}.tail.bytes is {tail.bytes}; blocks {first_block} to {about.depth - 1} of "
            f"'{about.model}' take {size}"
        )


def load_tail(store: Store, stream: str, layers: Sequence[int]) -> Teacher:
    """The rest of the teacher of a stream, with taps on ``layers``. Raises ``UserError`` where its
    weights are missing or not those that the store was made with."""
    check_tail(store, stream)
    about, tail, first_block = _declared(store, stream)
    try:
        return Teacher(
            teacher_config(about),
            resolution=store.manifest.resolution,
            layers=layers,
            first_block=first_block,
            tail=load(_read(store, stream)),
        )
    except (ValueError, SafetensorError) as error:
        raise UserError(
            f"{store.shown_url}/{tail.file} does not hold blocks {first_block} to "
            f"{about.depth - 1} of '{about.model}': {str(error)[:200]}"
        ) from None


def _declared(store: Store, stream: str) -> tuple[TeacherInfo, WeightsFile, int]:
    """A stream's teacher, the file of its tail, and the block with which that begins."""
    about = store.manifest.teacher_streams[stream]
    first_block = first_tail_block(about.cut, about.teacher.layers)
    if about.tail is None or first_block is None:
        raise UserError(f"store '{store.shown_url}' carries no weights of its teacher")
    return about.teacher, about.tail, first_block


def _read(store: Store, stream: str) -> bytes:
    _, tail, _ = _declared(store, stream)
    where = f"{store.shown_url}/{tail.file}"
    try:
        path = f"{store.root}/{tail.file}"
        whole = file_size(store.filesystem, path) == tail.bytes  # else it is not read
        data = read_bytes(store.filesystem, path) if whole else b""
    except FileNotFoundError:
        raise UserError(f"{where} is missing: run the extraction again") from None
    if hashlib.sha256(data).hexdigest() != tail.sha256:
        raise UserError(f"{where} is damaged: its checksum is wrong; run the extraction again")
    return data
