"""Fréchet distance of a run's samples while it trains."""

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
from pipeline.models import Student
from pipeline.runs.evaluations import check_rows, find_evaluation, record_evaluation
from pipeline.runs.metrics import EVALUATION, NO_DISTANCE
from pipeline.sampling.batches import choose_labels
from pipeline.storage.npz import Archive
from pipeline.train.validation.sampling import DistributedSampler
from pipeline.train.validation.schedule import Pause, is_due
from schemas.errors import UserError, plain_text
from schemas.evaluate import Evaluation, RecordedEvaluation
from schemas.run import RunConfig
from schemas.sample import Sampling


class RunEvaluation:
    """Draws images of random classes with the averaged weights, all workers together, and compares
    their features with a reference's."""

    def __init__(self, config: RunConfig, sampler: DistributedSampler, folder: Path) -> None:
        """Raises ``UserError`` where the reference is not of the network, or cannot be read."""
        self.options = options = config.samples.evaluate
        assert options.images is not None
        assert options.reference is not None
        self.images = options.images
        self.seed = config.samples.sampler.seed
        self.every, self.last = options.every or config.samples.every, config.steps
        self.sampler = sampler
        self.folder = folder
        device = sampler.group.device
        self.network = open_network(options, device=device, option="--samples.evaluate.network")
        option = "--samples.evaluate.reference"
        archive = Archive(options.reference, option)
        self.reference = load_moments(archive, self.network)
        try:  # fail now rather than after hours
            self.factored = Factored.of(self.reference)  # factored once for all evaluations
            frechet_distance(self.factored, self.factored)
        except ValueError as error:
            raise UserError(f"{archive.where}: {error}") from None
        width = self.network.extract(torch.zeros(1, 3, 8, 8, dtype=torch.uint8)).features.shape[1]
        if len(self.reference.mean) != width:
            raise UserError(
                f"{archive.where}: its mean has {len(self.reference.mean)} numbers, "
                f"'{self.network.name}' gives {width} features: it is of another network"
            )
        if sampler.group.is_main:
            check_rows(folder)
        embedder = sampler.embedder
        self.classes = () if embedder is not None else sampler.classes.trained
        self.sampling = Sampling.of(
            config.samples.sampler,
            labels="random",
            classes=self.classes,
            decoder_sha256=sampler.autoencoder.weights_sha256,
            precision=sampler.precision,
            captions_sha256=None if embedder is None else embedder.prompts.sha256(options.images),
        )

    def due(self, step: int) -> bool:
        return is_due(step, self.every, self.last)

    def recorded(self, student: Student, step: int) -> dict[str, Any] | None:
        """The event that ``measure`` returned for this student, if ``evaluations.jsonl`` has its
        row, else None. Every rank calls this; only the main rank reads the numbers."""
        group, row = self.sampler.group, None
        if group.is_main:
            row = find_evaluation(self.folder, self._row(student, step))
        if not group.broadcast_int(row is not None):
            return None
        return _event(row or {"fid": None, "samples": self.images, "network": self.network.name})

    def measure(self, student: Student, step: int, pause: Pause) -> dict[str, Any]:
        """Every rank calls this. Returns, on the main rank, the event for the metrics, and adds a
        row to ``evaluations.jsonl``; no row where the samples have no distance, because samples
        that overflow do not end a run whose weights are finite."""
        sampler, group = self.sampler, self.sampler.group
        # with one common shift, sums can be added over the workers
        found = FeatureStatistics(
            len(self.reference.mean), shift=self.reference.mean, device=group.device
        )
        if sampler.embedder is None:
            labels = choose_labels("random", self.classes, self.seed, 0, self.images)
        else:
            labels = list(range(self.images))
        broken = 0
        for batch in sampler.sample(student, labels, pause):
            broken += batch.broken
            with sampler.enough_memory(len(batch.images)):
                features = self.network.extract(batch.images).features
            finite = features.isfinite().all(1)
            broken += int((~finite).sum())
            found.add(features[finite])
        broken = group.sum_counts({"broken": broken})["broken"]
        found.load_state(group.sum(found.state()))
        if broken:
            reason = f"{broken} of {self.images} samples are not made of finite numbers"
            return {"event": NO_DISTANCE, "reason": reason}
        distance = 0.0
        if group.is_main:
            try:
                distance = self._distance(found)
            except torch.OutOfMemoryError:
                raise
            except (ValueError, RuntimeError) as error:
                return {"event": NO_DISTANCE, "reason": plain_text(str(error))[:200]}
            row = self._row(student, step).model_copy(update={"fid": distance})
            record_evaluation(self.folder, row)
        return _event({"fid": distance, "samples": self.images, "network": self.network.name})

    def _row(self, student: Student, step: int) -> RecordedEvaluation:
        """The row that ``jobs/evaluate.py --record`` would write for the same images, with a
        distance of 0 in place of the measured one."""
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
        decoder = self.sampler.autoencoder.name
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
