"""The part of the teacher that training runs: its weights lie in the store, so that training needs
neither the hub nor the part before the cut."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import save

from pipeline.files import file_size, open_url, read_bytes, write_atomic
from pipeline.store import Store
from pipeline.teachers import Teacher
from pipeline.teachers.vit import tail_state
from schemas.errors import UserError
from schemas.extract import Cut, TeacherConfig
from schemas.store import TeacherStream, WeightsFile


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


def copy_tail(store: Store, stream: TeacherStream, url: str, name: str) -> WeightsFile:
    """Put the tail of a store's stream beside the shards of another, for its stream ``name``.
    Raises ``UserError`` where it is missing or damaged."""
    return _write(_read(store, stream), url, name)


def _write(data: bytes, url: str, stream: str) -> WeightsFile:
    filesystem, root = open_url(url, what="--store")
    file = tail_file(stream)
    write_atomic(filesystem, f"{root}/{file}", data)
    return WeightsFile(file=file, bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


def load_tail(store: Store, stream: TeacherStream, layers: Sequence[int]) -> Teacher:
    """The rest of the teacher of a stream, with taps on ``layers``. Raises ``UserError`` where its
    weights are missing or not those that the store was made with."""
    data = _read(store, stream)
    first_block = first_tail_block(stream.cut, stream.teacher.layers)
    assert first_block is not None  # else there are no data
    with tempfile.TemporaryDirectory(prefix="haste-teacher-") as folder:
        path = Path(folder) / "tail.safetensors"
        path.write_bytes(data)
        config = TeacherConfig(
            model=stream.teacher.model,
            model_args=stream.teacher.model_args,
            image_size=stream.teacher.image_size,
            weights=str(path),
        )
        return Teacher(
            config, resolution=store.manifest.resolution, layers=layers, first_block=first_block
        )


def _read(store: Store, stream: TeacherStream) -> bytes:
    if stream.tail is None or stream.cut not in {"activations", "image"}:
        raise UserError(f"store '{store.shown_url}' carries no weights of its teacher")
    where = f"{store.shown_url}/{stream.tail.file}"
    try:
        path = f"{store.root}/{stream.tail.file}"
        whole = file_size(store.filesystem, path) == stream.tail.bytes  # else it is not read
        data = read_bytes(store.filesystem, path) if whole else b""
    except FileNotFoundError:
        raise UserError(f"{where} is missing: run the extraction again") from None
    if hashlib.sha256(data).hexdigest() != stream.tail.sha256:
        raise UserError(f"{where} is damaged: its checksum is wrong; run the extraction again")
    return data
