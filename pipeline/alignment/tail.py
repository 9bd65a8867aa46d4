"""The part of the teacher that training runs: its weights lie in the store, so that training needs
neither the hub nor the part before the cut."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import save

from pipeline.files import open_url, read_bytes, write_atomic
from pipeline.store import Store
from pipeline.teachers import Teacher
from schemas.errors import UserError
from schemas.extract import TeacherConfig
from schemas.store import WeightsFile

TAIL = "teacher_tail.safetensors"


def save_tail(teacher: Teacher, url: str) -> WeightsFile:
    """Write the teacher's weights beside the shards of the store at ``url``."""
    filesystem, root = open_url(url, what="--store")
    state = {name: value.cpu().contiguous() for name, value in teacher.vit.state_dict().items()}
    data = save(state)
    write_atomic(filesystem, f"{root}/{TAIL}", data)
    return WeightsFile(file=TAIL, bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


def load_tail(store: Store, layers: Sequence[int]) -> Teacher:
    """The teacher of a store, with taps on ``layers``. Raises ``UserError`` where its weights are
    missing or not those that the store was made with."""
    manifest = store.manifest
    where = f"{store.shown_url}/{TAIL}"
    if manifest.tail is None:
        raise UserError(f"store '{store.shown_url}' carries no weights of its teacher")
    try:
        data = read_bytes(store.filesystem, f"{store.root}/{manifest.tail.file}")
    except FileNotFoundError:
        raise UserError(f"{where} is missing: run the extraction again") from None
    if hashlib.sha256(data).hexdigest() != manifest.tail.sha256:
        raise UserError(f"{where} is damaged: its checksum is wrong; run the extraction again")
    with tempfile.TemporaryDirectory(prefix="haste-teacher-") as folder:
        path = Path(folder) / TAIL
        path.write_bytes(data)
        config = TeacherConfig(
            model=manifest.teacher.model,
            model_args=manifest.teacher.model_args,
            image_size=manifest.teacher.image_size,
            weights=str(path),
        )
        teacher = Teacher(config, resolution=manifest.resolution, layers=layers)
    if teacher.weights_sha256 != manifest.teacher.weights_sha256:
        raise UserError(f"{where} holds other weights than the store was made with")
    return teacher
