"""Metrics of a run: rows of a JSONL file, TensorBoard, Weights & Biases, and a log line."""

from __future__ import annotations

import json
import logging
import math
import os
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pipeline.cli.progress import LINE_SECONDS
from pipeline.runs.directory import METRICS, WANDB_ID
from pipeline.storage.redaction import redacted_config
from schemas.errors import UserError
from schemas.run import RunConfig

logger = logging.getLogger(__name__)

EVALUATION = "evaluation"
"""Event of a row with the distance of samples from real images."""
NO_DISTANCE = "no evaluation"
"""Event of a row with the reason why there is no such distance."""
VALIDATION_LOSS = "validation loss"
"""Event of a row with denoising losses of validation samples."""
BROKEN_SAMPLES = "broken samples"
"""Event of a row with the number of pictures of a grid that are not finite."""
NOT_FINITE = "not finite"
"""Event of a row with the reason why a run stopped: losses or weights that are not finite."""


OBSERVERS: list[Callable[[Mapping[str, Any]], None]] = []
"""Called with every row that this process writes: other places that show a run."""


class MetricsLog:
    """Rows of ``metrics.jsonl`` in a run's folder; the first rank owns it."""

    def __init__(self, folder: Path, config: RunConfig, *, start_step: int, rows: int) -> None:
        """``rows`` of the file were written before the checkpoint at ``start_step`` from which the
        run continues; later rows are dropped, because their steps are repeated."""
        from torch.utils.tensorboard import SummaryWriter  # loads torch, which rows need not

        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / METRICS
        self.total_steps, self.global_batch = config.steps, config.global_batch
        self._logged = start_step, time.monotonic()
        self.rows = _truncate_rows(self.path, rows)
        self._file = self.path.open("a")
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=start_step + 1)
        self._wandb = _open_wandb(config, folder) if config.wandb else None
        logger.info("training from step %d to %d", start_step, config.steps)

    def row(self, values: dict[str, Any]) -> None:
        """Write one row; ``values["step"]`` is the number of finished steps."""
        self._file.write(json.dumps(values) + "\n")
        self._file.flush()
        self.rows += 1
        step = values["step"]
        for name, value in values.items():
            if isinstance(value, int | float) and name != "step":
                self._board.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(values, step=step)
        for observe in OBSERVERS:
            observe(values)
        logger.info("%s", self._line(values))
        self._logged = step, time.monotonic()

    def note_step(self, step: int) -> None:
        """Log that the training goes on, at most once in ``LINE_SECONDS`` without a row. Steps of
        a GPU may be queued and not computed yet."""
        now = time.monotonic()
        if now - self._logged[1] >= LINE_SECONDS:
            rate = (step - self._logged[0]) / (now - self._logged[1])
            self._logged = step, now
            logger.info("step %d/%d  %s", step, self.total_steps, self._pace(step, rate))

    def close(self) -> None:
        self._file.close()
        self._board.close()
        if self._wandb is not None:
            self._wandb.finish()

    def _line(self, row: dict[str, Any]) -> str:
        if "event" in row:
            detail = f"FID {row['fid']:.2f}" if "fid" in row else row.get("reason")
            if row["event"] == VALIDATION_LOSS:
                ema, model = (
                    math.nan if row[key] is None else row[key]
                    for key in ("validation_ema", "validation_model")
                )
                detail = f"{ema:.4f} averaged weights, {model:.4f} as trained"
            return f"step {row['step']}: {row['event']}" + (f", {detail}" if detail else "")
        rate = row["steps_per_second"]
        parts = [f"step {row['step']}/{self.total_steps}", f"phase {row['phase']}"]
        parts += [
            f"{name} {row[name]:.4f}"
            for name in ("denoising", "class_token", "feature", "attention")
            if name in row
        ]
        parts += [f"{row['skipped_steps']} steps skipped"] if row.get("skipped_steps") else []
        parts += [f"data wait {row['data_wait_share']:.0%}", self._pace(row["step"], rate)]
        return "  ".join(parts)

    def _pace(self, step: int, rate: float) -> str:
        """Rates of ``rate`` steps/s, and the time of the remaining steps."""
        left = int((self.total_steps - step) / rate) if rate else 0
        speed = rate * self.global_batch
        images = f"{speed:.{0 if speed >= 10 else 1}f} images/s"
        eta = f"ETA {left // 3600}:{left // 60 % 60:02d}:{left % 60:02d}"
        return f"{rate:.2f} steps/s  {images}  {eta}"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All valid rows; a last line that a crash cut short is left out."""
    rows = []
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                continue
    return rows


def _truncate_rows(path: Path, count: int) -> int:
    """Keep the first ``count`` rows. Returns the number of rows left."""
    rows = read_metrics(path)[:count]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))
    os.replace(temporary, path)
    return len(rows)


def _wandb_id(path: Path) -> str:
    """The id of this run at Weights & Biases, kept in the run's folder, so that a restarted run
    continues there instead of starting another."""
    if not path.exists():
        path.write_text(uuid.uuid4().hex[:16] + "\n")
    return path.read_text().strip()


def _open_wandb(config: RunConfig, folder: Path) -> Any:
    try:
        import wandb  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        raise UserError("--wandb needs the package: pip install '.[wandb]'") from None
    return wandb.init(
        project=config.wandb,
        name=config.name,
        id=_wandb_id(folder / WANDB_ID),
        resume="allow",
        dir=str(folder),
        config=redacted_config(config.model_dump()),
    )
