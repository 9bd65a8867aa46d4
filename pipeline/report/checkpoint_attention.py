"""Attention pictures of the checkpoints that a run kept, for runs that drew none themselves."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np

from pipeline.checkpoints.integrity import STATE
from pipeline.checkpoints.selection import checkpoint_name
from pipeline.checkpoints.state import read_state
from pipeline.checkpoints.student import load_student
from pipeline.runs.reader import MAX_STATE_BYTES, Record
from pipeline.storage.redaction import redact
from pipeline.store import Store
from pipeline.text import shortened
from pipeline.visualization.attention import draw_attention
from schemas.errors import UserError, plain_text
from schemas.student import StudentConfig

MAX_CHECKPOINTS = 3
SAMPLES = 3
MAX_WEIGHTS = 2_000_000_000
"""Of a student that is built for a picture: three times SiT-XL/2's. A config can ask for any."""
MAX_BLOCKS, MAX_TOKENS = 256, 4096
MAX_BYTES = 64 << 30
"""Of a checkpoint's files, all of which are read: of so large a student, with its optimizer."""


def attention_of_kept(
    record: Record, *, remote_stores: bool = False
) -> tuple[dict[int, bytes], str | None]:
    """PNG files by step: a few samples' attention in the teacher and in the student of kept
    checkpoints. And a sentence where there is something to say, such as why there are none.

    ``remote_stores``: whether a store at a URL may be opened. A run's config names what its writer
    liked, and looking at a run is no reason to connect to it.
    """
    config, folder = record.valid, record.folder
    if config is None or config.store is None:
        return {}, "its config, which names store and student, is not known"
    if not config.alignment.attention_weight:
        return {}, "its attention was never aligned with a teacher's"
    if folder is None:
        return {}, "its checkpoints are not on this machine"
    if not remote_stores and not _is_path(config.store):
        where = shortened(redact(config.store), 120)
        return {}, f"its store '{where}' is not on this machine: --attention remote opens it"
    if not record.checkpoints:
        return {}, "it has kept no checkpoint yet"
    kept = record.checkpoints
    places = np.linspace(0, len(kept) - 1, min(len(kept), MAX_CHECKPOINTS)).round().astype(int)
    pictures: dict[int, bytes] = {}
    print(f"drawing the attention of {plain_text(record.url)} ...", file=sys.stderr)
    try:
        for step in (kept[place] for place in places):
            pictures[step] = _draw(record, folder / checkpoint_name(step))
    except Exception as error:  # torch and diffusers raise whatever a store or weights do to them
        reason = plain_text(redact(str(error))) or type(error).__name__
        return pictures, f"it cannot be drawn of its checkpoints: {reason[:300]}"
    return pictures, None


def _draw(record: Record, checkpoint: Path) -> bytes:
    assert record.valid is not None
    _check_size(checkpoint)
    student, state = load_student(checkpoint)
    store = Store.open(str(record.valid.store))
    samples = store.record(0).samples
    rows = sorted(set(np.linspace(0, samples - 1, min(samples, SAMPLES)).astype(int).tolist()))
    with tempfile.TemporaryDirectory(prefix="haste-report-") as scratch:
        path = Path(scratch) / "attention.png"
        students = {f"student at step {state.step}": student}
        draw_attention(store, students, state.config.alignment, rows, path)
        return path.read_bytes()


def _is_path(store: str) -> bool:
    """Whether it names a folder of this machine. Told by the text: some filesystems connect as
    soon as they are made."""
    return "::" not in store and ("://" not in store or store.startswith("file://"))


def _check_size(checkpoint: Path) -> None:
    """Raises ``UserError`` where a student, or its checkpoint, is beyond all bounds."""
    state = checkpoint / STATE
    if state.exists() and state.stat().st_size > MAX_STATE_BYTES:
        raise UserError(f"{checkpoint.name}/{STATE} has more than {MAX_STATE_BYTES >> 20} MiB")
    student = read_state(checkpoint).config.student
    weights, tokens = _weights(student), student.grid[0] * student.grid[1]
    if weights > MAX_WEIGHTS or student.size.depth > MAX_BLOCKS or tokens > MAX_TOKENS:
        raise UserError(
            f"the student of {checkpoint.name} is too large: the report builds those of up to "
            f"{MAX_WEIGHTS // 10**9} billion weights, {MAX_BLOCKS} blocks, {MAX_TOKENS} tokens"
        )
    found = sum(path.stat().st_size for path in checkpoint.iterdir())
    if found > MAX_BYTES:
        raise UserError(
            f"{checkpoint.name} has {found >> 30} GiB; the report reads {MAX_BYTES >> 30} at most"
        )


def _weights(student: StudentConfig) -> int:
    """About as many as ``make_student`` would allocate, told without doing so."""
    depth, width, _, patch = student.size
    block = 18 * width * width  # attention 4, MLP 8, modulation 6
    pixels = 3 * student.latent_channels * patch * patch  # in, and out (twice for DiT)
    rest = student.num_classes + student.grid[0] * student.grid[1] + pixels + 4 * width
    return depth * block + rest * width
