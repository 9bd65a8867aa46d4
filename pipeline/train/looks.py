"""What is looked at while a run trains: grids of samples, and their distance from real images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.models import SiT
from pipeline.train.drawing import SharedDrawing
from pipeline.train.evaluation import RunEvaluation
from pipeline.train.parallel import Parallel
from pipeline.train.pictures import SampleGrids
from schemas.run import RunConfig
from schemas.store import Manifest


class Looks:
    """Both of them, drawn by one decoder."""

    def __init__(
        self, config: RunConfig, manifest: Manifest, parallel: Parallel, folder: Path
    ) -> None:
        """Raises ``UserError`` where something that will be needed is not there."""
        drawing = SharedDrawing(config, manifest, parallel)
        self.grids = SampleGrids(config, drawing, folder)
        evaluates = config.samples.evaluate.images is not None
        self.evaluation = RunEvaluation(config, drawing, folder) if evaluates else None

    def due(self, step: int) -> bool:
        """Whether there is something to do after this step."""
        evaluation = self.evaluation
        return self.grids.due(step) or (evaluation is not None and evaluation.due(step))

    def take(self, student: SiT, step: int) -> dict[str, Any] | None:
        """Every worker calls this where it is due; the evaluation's row, if there was one."""
        if self.grids.due(step):
            self.grids.draw(student, step)
        if self.evaluation is None or not self.evaluation.due(step):
            return None
        return self.evaluation.measure(student, step)
