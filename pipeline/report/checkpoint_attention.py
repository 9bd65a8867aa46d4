"""Attention pictures of a run's checkpoints, for runs that drew none themselves."""

from __future__ import annotations

import logging
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
MAX_SAMPLES = 3
MAX_WEIGHTS = 2_000_000_000
"""Weights of a student, three times those of SiT-XL/2, because the config is not trusted."""
MAX_BLOCKS, MAX_TOKENS = 256, 4096
MAX_BYTES = 64 << 30
"""Bytes of all files of a checkpoint, which are all read: the largest student and its optimizer."""

logger = logging.getLogger(__name__)


def draw_checkpoint_attention(
    record: Record, *, remote_stores: bool = False
) -> tuple[dict[int, bytes], str | None]:
    """PNG files by step: the teacher's and the student's attention on a few samples, for up to
    ``MAX_CHECKPOINTS`` checkpoints of a run; and the reason where some or all are missing.

    ``remote_stores``: also open a store at a URL. The default is not to, because the config is not
    trusted: a URL in it must not cause a connection unless the user asks for it.
    """
    reason = _why_not(record, remote_stores)
    if reason is not None or record.folder is None:
        return {}, reason
    steps = record.checkpoints
    chosen = np.linspace(0, len(steps) - 1, min(len(steps), MAX_CHECKPOINTS)).round().astype(int)
    pictures: dict[int, bytes] = {}
    logger.info("drawing the attention of %s", plain_text(record.url))
    try:
        for step in (steps[index] for index in chosen):
            pictures[step] = _draw(record, record.folder / checkpoint_name(step))
    except Exception as error:  # torch and diffusers raise any type for a damaged store or weights
        message = plain_text(redact(str(error))) or type(error).__name__
        return pictures, f"attention cannot be drawn from its checkpoints: {message[:300]}"
    return pictures, None


def _why_not(record: Record, remote_stores: bool) -> str | None:
    """The reason why no checkpoint can be drawn; None if one can be tried."""
    config = record.valid
    if config is None or config.store is None:
        return "its config, which names store and student, is not known"
    if config.alignment.attended is None:
        return "it has no attention alignment"
    if record.folder is None:
        return "its checkpoints are not on this machine"
    if not remote_stores and not _is_local_path(config.store):
        url = shortened(redact(config.store), 120)
        return f"its store '{url}' is not on this machine: --attention remote opens it"
    return None if record.checkpoints else "it has no checkpoint yet"


def _draw(record: Record, checkpoint: Path) -> bytes:
    assert record.valid is not None
    _check_size(checkpoint)
    student, state = load_student(checkpoint)
    store = Store.open(str(record.valid.store))
    count = store.record(0).samples
    rows = np.linspace(0, count - 1, min(count, MAX_SAMPLES)).astype(int).tolist()
    with tempfile.TemporaryDirectory(prefix="haste-report-") as folder:
        path = Path(folder) / "attention.png"
        students = {f"student at step {state.step}": student}
        alignment, tokens = state.config.alignment, state.config.diffusion.class_stream
        draw_attention(store, students, alignment.attended or alignment, rows, path, tokens)
        return path.read_bytes()


def _is_local_path(store: str) -> bool:
    """True if ``store`` names a local folder; decided from the text, because some filesystems
    connect as soon as they are created."""
    return "::" not in store and ("://" not in store or store.startswith("file://"))


def _check_size(checkpoint: Path) -> None:
    """Raises ``UserError`` where a checkpoint or its student exceeds the limits."""
    state = checkpoint / STATE
    if state.exists() and state.stat().st_size > MAX_STATE_BYTES:
        raise UserError(f"{checkpoint.name}/{STATE} has more than {MAX_STATE_BYTES >> 20} MiB")
    student = read_state(checkpoint).config.student
    weights, tokens = _count_weights(student), student.grid[0] * student.grid[1]
    if weights > MAX_WEIGHTS or student.size.depth > MAX_BLOCKS or tokens > MAX_TOKENS:
        raise UserError(
            f"the student of {checkpoint.name} is too large: the report builds students of at most "
            f"{MAX_WEIGHTS // 10**9} billion weights, {MAX_BLOCKS} blocks and {MAX_TOKENS} tokens"
        )
    size = sum(path.stat().st_size for path in checkpoint.iterdir())
    if size > MAX_BYTES:
        raise UserError(
            f"{checkpoint.name} has {size >> 30} GiB; the report reads at most {MAX_BYTES >> 30}"
        )


def _count_weights(student: StudentConfig) -> int:
    """Approximate number of weights that ``make_student`` would allocate."""
    depth, width, _, patch = student.size
    block = 18 * width * width  # attention 4, MLP 8, modulation 6
    pixels = 3 * student.latent_channels * patch * patch  # in, and out (twice for DiT)
    rest = student.num_classes + student.grid[0] * student.grid[1] + pixels + 4 * width
    if student.family == "MMDiT":  # a block for each modality, and the entry of the text
        return 2 * depth * block + (rest + sum(student.text_shape)) * width
    return depth * block + rest * width
