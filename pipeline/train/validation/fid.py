"""A small Fréchet distance while a run trains."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from pipeline.evaluate.features.factory import open_network
from pipeline.evaluate.frechet import Factored, FeatureStatistics, frechet_distance
from pipeline.evaluate.metrics import SampleOrigin, evaluation_row
from pipeline.evaluate.reference_statistics import load_moments
from pipeline.hashing import sha256_of_module
from pipeline.models import SiT
from pipeline.runs.evaluations import check_rows, find_evaluation, record_evaluation
from pipeline.runs.metrics import EVALUATION, NO_DISTANCE
from pipeline.sampling.batches import choose_labels
from pipeline.storage.npz import Archive
from pipeline.train.validation.sampling import DistributedSampler, Pause, is_due
from schemas.errors import UserError
from schemas.evaluate import Evaluation, RecordedEvaluation
from schemas.run import RunConfig
from schemas.sample import Sampling


class RunEvaluation:
    """Draws images of random classes with the averaged weights, all workers together, and compares
    their features with a reference's."""

    def __init__(self, config: RunConfig, drawing: DistributedSampler, folder: Path) -> None:
        """Raises ``UserError`` where the reference is not of the network, or cannot be read."""
        self.options = options = config.samples.evaluate
        assert options.images is not None
        assert options.reference is not None
        self.images = options.images
        self.seed = config.samples.sampler.seed
        self.every, self.last = options.every or config.samples.every, config.steps
        self.drawing = drawing
        self.folder = folder
        device = drawing.parallel.device
        self.network = open_network(options, device=device, option="--samples.evaluate.network")
        option = "--samples.evaluate.reference"
        archive = Archive(options.reference, option)
        self.reference = load_moments(archive, self.network)
        try:  # now, rather than after hours
            self.factored = Factored.of(self.reference)  # once, not at every evaluation
            frechet_distance(self.factored, self.factored)
        except ValueError as error:
            raise UserError(f"{archive.where}: {error}") from None
        width = self.network.extract(torch.zeros(1, 3, 8, 8, dtype=torch.uint8)).features.shape[1]
        if len(self.reference.mean) != width:
            raise UserError(
                f"{archive.where}: its mean has {len(self.reference.mean)} numbers, "
                f"'{self.network.name}' gives {width} features: it is of another network"
            )
        if drawing.parallel.is_main:
            check_rows(folder)
        self.classes = range(drawing.num_classes)
        self.sampling = Sampling.of(
            config.samples.sampler,
            labels="random",
            classes=self.classes,
            decoder_sha256=drawing.autoencoder.weights_sha256,
            precision=drawing.precision,
        )

    def due(self, step: int) -> bool:
        return is_due(step, self.every, self.last)

    def recorded(self, student: SiT, step: int) -> dict[str, Any] | None:
        """What ``measure`` returned of this student, where a row of ``evaluations.jsonl`` on the
        first rank still says so. Every rank calls this; the others are told no more than that it
        does."""
        parallel, there = self.drawing.parallel, None
        if parallel.is_main:
            there = find_evaluation(self.folder, self._row(student, step))
        if not parallel.broadcast_int(there is not None):
            return None
        return _event(there or {"fid": None, "samples": self.images, "network": self.network.name})

    def measure(self, student: SiT, step: int, pause: Pause) -> dict[str, Any]:
        """Every rank calls this; on the first one the event for the metrics. ``evaluations.jsonl``
        has a row with the distance then, or none where the samples have no distance: a student that
        diverged does not end the run."""
        drawing, parallel = self.drawing, self.drawing.parallel
        # sums about one point can be added over the workers
        found = FeatureStatistics(
            len(self.reference.mean), shift=self.reference.mean, device=parallel.device
        )
        labels = choose_labels("random", self.classes, self.seed, 0, self.images)
        broken = 0
        for drawn in drawing.draw(student, labels, pause):
            broken += drawn.broken
            with drawing.enough_memory(len(drawn.images)):
                features = self.network.extract(drawn.images).features
            finite = features.isfinite().all(1)
            broken += int((~finite).sum())
            found.add(features[finite])
        broken = parallel.sum_counts({"broken": broken})["broken"]
        found.load_state(parallel.sum(found.state()))
        if broken:
            reason = f"{broken} of {self.images} samples are not made of finite numbers"
            return {"event": NO_DISTANCE, "reason": reason}
        distance = 0.0
        if parallel.is_main:
            try:
                distance = self._distance(found)
            except torch.OutOfMemoryError:
                raise
            except (ValueError, RuntimeError) as error:
                return {"event": NO_DISTANCE, "reason": " ".join(str(error).split())[:200]}
            row = self._row(student, step).model_copy(update={"fid": distance})
            record_evaluation(self.folder, row)
        return _event({"fid": distance, "samples": self.images, "network": self.network.name})

    def _row(self, student: SiT, step: int) -> RecordedEvaluation:
        """As ``jobs/evaluate.py --record`` would make it of the same images, but for the distance,
        which is not known yet."""
        numbers = Evaluation(
            fid=0,
            sfid=None,
            inception_score=None,
            precision=None,
            recall=None,
            fd_dinov2=None,
            samples=self.images,
            network=self.network.name,
        )
        decoder = self.drawing.autoencoder.name
        origin = SampleOrigin(step, "ema", sha256_of_module(student), self.sampling, decoder)
        place = str(self.options.reference)
        return evaluation_row(numbers, origin, self.network, self.reference, place)

    def _distance(self, found: FeatureStatistics) -> float:
        distance = frechet_distance(found, self.factored)
        if not math.isfinite(distance):
            raise ValueError("the distance is not finite")
        return distance


def _event(row: dict[str, Any]) -> dict[str, Any]:
    return {"event": EVALUATION, **{name: row[name] for name in ("fid", "samples", "network")}}
