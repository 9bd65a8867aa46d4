"""Measurements of a set of images in one pass: all that a comparison with another set needs."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.cli.progress import progress_bar
from pipeline.evaluate.features.base import Network
from pipeline.evaluate.features.clip import ClipScore
from pipeline.evaluate.features.timm_network import FeatureNetwork
from pipeline.evaluate.frechet import FeatureStatistics, Moments
from pipeline.evaluate.images.sources import Images
from pipeline.evaluate.inception_score import InceptionScore
from schemas.errors import UserError


@dataclass
class Measurements:
    """Features of a set of images, as moments and as samples. None: unknown."""

    count: int
    """Number of images in the moments."""
    kind: str
    """Description of the images, for logs and files."""
    moments: Moments
    """Moments of the network's features."""
    features: np.ndarray | None
    """(N, D) float32 of all images, or of an evenly spaced subset."""
    spatial: Moments | None = None
    """Moments of the network's spatial features, for sFID."""
    dinov2: Moments | None = None
    """Moments of DINOv2's features."""
    resized: Moments | None = None
    """Moments of Inception's features with PyTorch's resizing."""
    clip_score: float | None = None
    """Agreement with the captions."""
    clip: str | None = None
    """Network of ``clip_score``."""
    inception_score: float | None = None


def measure(
    images: Images,
    network: Network,
    dinov2: FeatureNetwork | None,
    *,
    option: str,
    batch_size: int,
    max_features: int,
    resized: Network | None = None,
    clip: ClipScore | None = None,
) -> Measurements:
    """Run the networks on ``images``; ``resized`` is Inception with PyTorch's resizing, beside
    another. Features of at most ``max_features`` images are stored, on
    disk, so that memory does not grow with their number. Raises ``UserError``."""
    buffer = FeatureBuffer(images.count, max_features)
    moments: FeatureStatistics | None = None
    spatial: FeatureStatistics | None = None
    dinov2_moments: FeatureStatistics | None = None
    resized_moments: FeatureStatistics | None = None
    score: InceptionScore | None = None
    captions = images.captions() if clip is not None else None
    done = 0
    try:
        with progress_bar(total=images.count, unit="image", desc=option) as bar:
            for batch in images.batches(batch_size):
                output = network.extract(batch)
                buffer.add(output.features)
                moments = _add(moments, output.features)
                if output.spatial is not None:
                    spatial = _add(spatial, output.spatial)
                if output.logits is not None:
                    score = score or InceptionScore(images.count)
                    score.add(output.logits)
                if dinov2 is not None:
                    dinov2_moments = _add(dinov2_moments, dinov2.features(batch))
                if resized is not None:
                    resized_moments = _add(resized_moments, resized.extract(batch).features)
                if clip is not None and captions is not None:
                    clip.add(batch, captions[done : done + len(batch)])
                done += len(batch)
                bar.update(len(batch))
    except torch.OutOfMemoryError:
        raise UserError(
            f"{batch_size} images at a time do not fit into the GPU's memory: give a smaller "
            "--batch-size"
        ) from None
    except ValueError as error:
        raise UserError(
            f"{option}, images {done} to {done + batch_size}: the network gives {error}; its "
            "weights are damaged, or its features exceed float32"
        ) from None
    assert moments is not None
    return Measurements(
        count=images.count,
        kind=images.kind,
        moments=moments.moments(),
        features=buffer.rows(),
        spatial=None if spatial is None else spatial.moments(),
        dinov2=None if dinov2_moments is None else dinov2_moments.moments(),
        inception_score=None if score is None else score.score(),
        resized=None if resized_moments is None else resized_moments.moments(),
        clip_score=None if clip is None else clip.score(),
        clip=None if clip is None else clip.name,
    )


class FeatureBuffer:
    """Float32 rows in a temporary file, which the system deletes with the object."""

    def __init__(self, count: int, limit: int) -> None:
        """``count`` rows will be added; at most ``limit`` of them, evenly spaced, are stored."""
        self._count, self._limit = count, limit
        self._file = tempfile.TemporaryFile()  # noqa: SIM115
        self._added = self._stored = self._width = 0

    def add(self, features_BD: Tensor) -> None:
        """Add the next rows. Raises ``UserError`` where the disk is full."""
        numbers = np.arange(self._added, self._added + len(features_BD))
        self._added += len(numbers)
        rows = features_BD.float().cpu().numpy()
        if self._limit < self._count:
            limit, count = self._limit, self._count
            rows = rows[numbers * limit // count != (numbers + 1) * limit // count]
        self._width = rows.shape[1]
        self._stored += len(rows)
        try:
            self._file.write(np.ascontiguousarray(rows).data)
        except OSError as error:
            raise UserError(
                f"features cannot be written to '{tempfile.gettempdir()}': {error.strerror}; set "
                "TMPDIR to a disk with free space, or lower --manifold-images"
            ) from None

    def rows(self) -> np.ndarray:
        """(N, D) float32, a read-only memory map."""
        self._file.flush()
        shape = (self._stored, self._width)
        if not self._stored:
            return np.empty(shape, np.float32)
        return np.memmap(self._file, np.float32, "r", shape=shape)

    def close(self) -> None:
        """Close the file; arrays that ``rows`` returned stay readable."""
        self._file.close()


def _add(statistics: FeatureStatistics | None, features: Tensor) -> FeatureStatistics:
    if statistics is None:
        statistics = FeatureStatistics(features.shape[1], device=features.device)
    statistics.add(features)
    return statistics
