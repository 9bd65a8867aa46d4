"""Validation of a run while it trains: grids of samples, and their distance from real images."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.distributed.process_group import ProcessGroup
from pipeline.models import Student
from pipeline.train.validation.fid import RunEvaluation
from pipeline.train.validation.image_grids import SampleGrids
from pipeline.train.validation.sampling import DistributedSampler
from pipeline.train.validation.schedule import Pause
from schemas.run import RunConfig
from schemas.store import Manifest

if TYPE_CHECKING:
    from pipeline.text_encoders import TextEncoder


class Validator:
    """Sample grids and evaluation, decoded by one autoencoder."""

    def __init__(
        self,
        config: RunConfig,
        manifest: Manifest,
        group: ProcessGroup,
        folder: Path,
        encoder: TextEncoder | None = None,
    ) -> None:
        """``encoder`` of captions, if the training has loaded it. Raises ``UserError`` where a
        needed file or network is missing."""
        sampler = DistributedSampler(config, manifest, group, encoder)
        self.grids = SampleGrids(config, sampler, folder)
        evaluates = config.samples.evaluate.images is not None
        self.evaluation = RunEvaluation(config, sampler, folder) if evaluates else None

    def due(self, step: int) -> bool:
        """True if there is something to do after this step."""
        evaluation = self.evaluation
        return self.grids.due(step) or (evaluation is not None and evaluation.due(step))

    def run(
        self, student: Student, step: int, pause: Pause, *, resumed: bool
    ) -> list[dict[str, Any]]:
        """Every rank calls this where it is due. Returns, on the main rank, events for the metrics
        without their step. ``pause`` is called between batches and may raise. ``resumed``: an
        interrupted validation of this step may have recorded its distance already."""
        events: list[dict[str, Any]] = []
        if self.grids.due(step):
            events += self.grids.draw(student, step, pause)
        if self.evaluation is not None and self.evaluation.due(step):
            found = self.evaluation.recorded(student, step) if resumed else None
            events.append(found or self.evaluation.measure(student, step, pause))
        return events
