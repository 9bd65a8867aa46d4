"""What is looked at while a run trains: grids of samples, and their distance from real images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.distributed.process_group import ProcessGroup
from pipeline.models import SiT
from pipeline.train.validation.fid import RunEvaluation
from pipeline.train.validation.image_grids import SampleGrids
from pipeline.train.validation.sampling import DistributedSampler, Pause
from schemas.run import RunConfig
from schemas.store import Manifest


class Validator:
    """Both of them, drawn by one decoder."""

    def __init__(
        self, config: RunConfig, manifest: Manifest, parallel: ProcessGroup, folder: Path
    ) -> None:
        """Raises ``UserError`` where something that will be needed is not there."""
        drawing = DistributedSampler(config, manifest, parallel)
        self.grids = SampleGrids(config, drawing, folder)
        evaluates = config.samples.evaluate.images is not None
        self.evaluation = RunEvaluation(config, drawing, folder) if evaluates else None

    def due(self, step: int) -> bool:
        """Whether there is something to do after this step."""
        evaluation = self.evaluation
        return self.grids.due(step) or (evaluation is not None and evaluation.due(step))

    def run(self, student: SiT, step: int, pause: Pause, *, again: bool) -> list[dict[str, Any]]:
        """Every rank calls this where it is due; on the first one, what there is to say of it, as
        rows without their step. ``pause`` may end it between two batches. ``again``: an earlier
        look may have come so far that the distance, which takes longest, has been recorded."""
        said: list[dict[str, Any]] = []
        if self.grids.due(step):
            said += self.grids.draw(student, step, pause)
        if self.evaluation is not None and self.evaluation.due(step):
            found = self.evaluation.recorded(student, step) if again else None
            said.append(found or self.evaluation.measure(student, step, pause))
        return said
