"""A small Fréchet distance while a run trains."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from pipeline.archive import Archive
from pipeline.evaluate.frechet import Factored, frechet_distance
from pipeline.evaluate.networks import open_network
from pipeline.evaluate.record import Origin, check_rows, record_evaluation, recorded
from pipeline.evaluate.reference import load_moments
from pipeline.evaluate.statistics import FeatureStatistics
from pipeline.models import SiT
from pipeline.sampling.blocks import choose_labels
from pipeline.train.drawing import SharedDrawing
from schemas.errors import UserError
from schemas.evaluate import Evaluation
from schemas.run import RunConfig
from schemas.sample import Sampling


class RunEvaluation:
    """Draws images of random classes with the averaged weights, all workers together, and compares
    their features with a reference's."""

    def __init__(self, config: RunConfig, drawing: SharedDrawing, folder: Path) -> None:
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
        if drawing.parallel.is_first:
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
        return self.every is not None and (step % self.every == 0 or step == self.last)

    def measure(self, student: SiT, step: int) -> dict[str, Any] | None:
        """Every worker calls this; the first one's answer is the row that ``evaluations.jsonl`` now
        holds."""
        drawing, parallel = self.drawing, self.drawing.parallel
        # sums about one point can be added over the workers
        found = FeatureStatistics(
            len(self.reference.mean), shift=self.reference.mean, device=parallel.device
        )
        labels = choose_labels("random", self.classes, self.seed, 0, self.images)
        with drawing.autoencoder_at_hand():
            for numbers in drawing.mine(self.images):
                images = drawing.draw(student, labels, numbers)
                try:
                    found.add(self.network.extract(images).features)
                except ValueError as error:
                    raise UserError(
                        f"step {step}: '{self.network.name}' makes {error} of the samples"
                    ) from None
        found.load_state(parallel.sum(found.state()))
        if not parallel.is_first:
            return None
        return self._record(step, self._distance(found, step), found.count)

    def _record(self, step: int, distance: float, samples: int) -> dict[str, Any]:
        """As ``jobs/evaluate.py --record`` would of the same images."""
        numbers = Evaluation(
            fid=distance,
            sfid=None,
            inception_score=None,
            precision=None,
            recall=None,
            fd_dinov2=None,
            samples=samples,
            network=self.network.name,
        )
        origin = Origin(step, "ema", self.sampling, self.drawing.autoencoder.name)
        place = str(self.options.reference)
        row = recorded(numbers, origin, self.network, self.reference, place)
        return record_evaluation(self.folder, row)

    def _distance(self, found: FeatureStatistics, step: int) -> float:
        try:
            distance = frechet_distance(found, self.factored)
        except (ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"step {step}: no FID of the samples: {reason}") from None
        if not math.isfinite(distance):
            raise UserError(f"step {step}: the FID of the samples is not finite")
        return distance
