"""One pass over a set of images: everything that its comparison with another needs."""

from __future__ import annotations

import sys
import tempfile
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from pipeline.evaluate.features.base import Network
from pipeline.evaluate.features.timm_network import FeatureNetwork
from pipeline.evaluate.frechet import FeatureStatistics, Moments
from pipeline.evaluate.images.sources import Images
from pipeline.evaluate.inception_score import InceptionScore
from schemas.errors import UserError


@dataclass
class Measured:
    """What is known of a set of images."""

    count: int
    """Images that the moments are of."""
    kind: str
    """What they are, for people and files."""
    moments: Moments
    """Of the network's features."""
    features: np.ndarray | None
    """(N, D) float32 of all of them, or of an evenly spread part; None where only moments are
    known."""
    spatial: Moments | None = None
    dinov2: Moments | None = None
    inception_score: float | None = None


def measure(
    images: Images,
    network: Network,
    dinov2: FeatureNetwork | None,
    *,
    option: str,
    batch_size: int,
    manifold: int,
) -> Measured:
    """Run the networks over ``images``, ``manifold`` of whose features are kept (on disk). Memory
    does not grow with their number. Raises ``UserError``."""
    spool = FeatureBuffer(images.count, manifold)
    moments: FeatureStatistics | None = None
    spatial: FeatureStatistics | None = None
    of_dinov2: FeatureStatistics | None = None
    score: InceptionScore | None = None
    seen = 0
    try:
        with tqdm(total=images.count, unit="image", desc=option, file=sys.stderr) as bar:
            for batch in images.batches(batch_size):
                found = network.extract(batch)
                spool.add(found.features)
                moments = _add(moments, found.features)
                if found.spatial is not None:
                    spatial = _add(spatial, found.spatial)
                if found.logits is not None:
                    score = score or InceptionScore(images.count)
                    score.add(found.logits)
                if dinov2 is not None:
                    of_dinov2 = _add(of_dinov2, dinov2.features(batch))
                seen += len(batch)
                bar.update(len(batch))
    except torch.OutOfMemoryError:
        raise UserError(
            f"{batch_size} images at a time do not fit into the GPU's memory: give a smaller "
            "--batch-size"
        ) from None
    except ValueError as error:
        raise UserError(
            f"{option}, images {seen} to {seen + batch_size}: the network gives {error}; its "
            "weights are damaged, or wide beyond float32"
        ) from None
    assert moments is not None
    return Measured(
        count=images.count,
        kind=images.kind,
        moments=moments.moments(),
        features=spool.rows(),
        spatial=None if spatial is None else spatial.moments(),
        dinov2=None if of_dinov2 is None else of_dinov2.moments(),
        inception_score=None if score is None else score.score(),
    )


def _add(statistics: FeatureStatistics | None, features: torch.Tensor) -> FeatureStatistics:
    if statistics is None:
        statistics = FeatureStatistics(features.shape[1], device=features.device)
    statistics.add(features)
    return statistics


class FeatureBuffer:
    """Float32 rows in a temporary file, which is gone with the object."""

    def __init__(self, count: int, limit: int) -> None:
        """``count`` rows will be offered; at most ``limit``, evenly spread, are kept."""
        self._count, self._limit = count, limit
        self._file = tempfile.TemporaryFile()  # noqa: SIM115
        self._seen = self._kept = self._width = 0

    def add(self, features_BD: Tensor) -> None:
        """The next rows. Raises ``UserError`` where the disk is full."""
        numbers = np.arange(self._seen, self._seen + len(features_BD))
        self._seen += len(numbers)
        rows = features_BD.float().cpu().numpy()
        if self._limit < self._count:
            limit, count = self._limit, self._count
            rows = rows[numbers * limit // count != (numbers + 1) * limit // count]
        self._width = rows.shape[1]
        self._kept += len(rows)
        try:
            self._file.write(np.ascontiguousarray(rows).data)
        except OSError as error:
            raise UserError(
                f"features cannot be kept in '{tempfile.gettempdir()}': {error.strerror}; set "
                "TMPDIR to a disk with room, or lower --manifold-images"
            ) from None

    def rows(self) -> np.ndarray:
        """(N, D) float32, a read-only memory map."""
        self._file.flush()
        shape = (self._kept, self._width)
        if not self._kept:
            return np.empty(shape, np.float32)
        return np.memmap(self._file, np.float32, "r", shape=shape)

    def close(self) -> None:
        """Rows taken before stay readable as long as they are held."""
        self._file.close()
