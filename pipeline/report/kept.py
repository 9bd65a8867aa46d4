"""Attention pictures of the checkpoints that a run kept, for runs that drew none themselves."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np

from pipeline.report.attention import draw_attention
from pipeline.report.records import Record
from pipeline.sampling.trained import load_student
from pipeline.storage.credentials import without_credentials
from pipeline.store import Store
from pipeline.train.choose import checkpoint_name
from schemas.errors import plain_text

MOST_CHECKPOINTS = 3
SAMPLES = 3


def attention_of_kept(record: Record) -> tuple[dict[int, bytes], str | None]:
    """PNG files by step: a few samples' attention in the teacher and in the student of kept
    checkpoints. And a sentence where there is something to say, such as why there are none."""
    config, folder = record.valid, record.folder
    if config is None or config.store is None:
        return {}, "its config, which names store and student, is not known"
    if not config.alignment.attention_weight:
        return {}, "its attention was never aligned with a teacher's"
    if folder is None:
        return {}, "its checkpoints are not on this machine"
    if not record.checkpoints:
        return {}, "it has kept no checkpoint yet"
    kept = record.checkpoints
    places = np.linspace(0, len(kept) - 1, min(len(kept), MOST_CHECKPOINTS)).round().astype(int)
    pictures: dict[int, bytes] = {}
    print(f"drawing the attention of {plain_text(record.url)} ...", file=sys.stderr)
    try:
        for step in (kept[place] for place in places):
            pictures[step] = _draw(record, folder / checkpoint_name(step))
    except Exception as error:  # torch and diffusers raise whatever a store or weights do to them
        reason = plain_text(without_credentials(str(error))) or type(error).__name__
        return pictures, f"it cannot be drawn of its checkpoints: {reason[:300]}"
    return pictures, None


def _draw(record: Record, checkpoint: Path) -> bytes:
    assert record.valid is not None
    student, state = load_student(checkpoint)
    store = Store.open(str(record.valid.store))
    samples = store.record(0).samples
    rows = sorted(set(np.linspace(0, samples - 1, min(samples, SAMPLES)).astype(int).tolist()))
    with tempfile.TemporaryDirectory(prefix="haste-report-") as scratch:
        path = Path(scratch) / "attention.png"
        students = {f"student at step {state.step}": student}
        draw_attention(store, students, state.config.alignment, rows, path)
        return path.read_bytes()
