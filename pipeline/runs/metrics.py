"""What a run writes down as it goes: a JSONL file, TensorBoard, and a line for the person."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from pipeline.storage.redaction import redacted_config
from schemas.errors import UserError
from schemas.run import RunConfig

METRICS = "metrics.jsonl"
SUMMARY = "summary.json"
CONFIG = "config.yaml"
SAMPLES = "samples"
"""The folder of sample grids, below a run's."""
EVALUATION = "evaluation"
"""The event of a row that says how far samples are from real images."""
NO_DISTANCE = "no evaluation"
"""The event of a row that says why there is no such distance."""
BROKEN_SAMPLES = "broken samples"
"""The event of a row that says how many pictures of a grid are none."""


class MetricsLog:
    """Rows of ``metrics.jsonl`` in a run's folder; the first rank owns it."""

    def __init__(self, folder: Path, config: RunConfig, *, start_step: int, rows: int) -> None:
        """``rows`` of the file were written up to the checkpoint at ``start_step`` from which the
        run goes on; more come from what will be done again and are dropped."""
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / METRICS
        self.total_steps = config.steps
        self.rows = _keep_rows(self.path, rows)
        self._file = self.path.open("a")
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=start_step + 1)
        self._wandb = _open_wandb(config, folder) if config.wandb else None

    def row(self, values: dict[str, Any]) -> None:
        """Write one row; ``values["step"]`` counts finished steps."""
        self._file.write(json.dumps(values) + "\n")
        self._file.flush()
        self.rows += 1
        step = values["step"]
        for name, value in values.items():
            if isinstance(value, int | float) and name != "step":
                self._board.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(values, step=step)
        sys.stderr.write(self._line(values) + "\n")  # Ray Train prints what is print()ed twice

    def close(self) -> None:
        self._file.close()
        self._board.close()
        if self._wandb is not None:
            self._wandb.finish()

    def _line(self, row: dict[str, Any]) -> str:
        if "event" in row:
            said = f"FID {row['fid']:.2f}" if "fid" in row else row.get("reason")
            return f"step {row['step']}: {row['event']}" + (f", {said}" if said else "")
        rate = row["steps_per_second"]
        left = (self.total_steps - row["step"]) / rate if rate else 0
        parts = [f"step {row['step']}/{self.total_steps}", f"phase {row['phase']}"]
        parts += [
            f"{name} {row[name]:.4f}"
            for name in ("denoising", "feature", "attention")
            if name in row
        ]
        parts += [f"{rate:.2f} steps/s", f"data wait {row['data_wait_share']:.0%}"]
        return "  ".join(
            [*parts, f"ETA {int(left) // 3600}:{int(left) // 60 % 60:02d}:{int(left) % 60:02d}"]
        )


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All whole rows; a last line that a crash cut short is left out."""
    rows = []
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                continue
    return rows


def _keep_rows(path: Path, count: int) -> int:
    """Keep the first ``count`` rows; how many there are then."""
    rows = read_metrics(path)[:count]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))
    os.replace(temporary, path)
    return len(rows)


def _open_wandb(config: RunConfig, folder: Path) -> Any:
    try:
        import wandb  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        raise UserError("--wandb needs the package: pip install '.[wandb]'") from None
    return wandb.init(
        project=config.wandb,
        name=config.name,
        dir=str(folder),
        config=redacted_config(config.model_dump()),
    )
