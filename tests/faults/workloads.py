"""The workloads that are disturbed, started as a user would: one extraction, one training.

The data set is scikit-learn's digits as PNG files; teacher and autoencoder are the demo's.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from pipeline.datasets.digits import digits_images
from pipeline.runs.directory import METRICS
from schemas.extract import PRESETS
from tests.faults import files

SAMPLES = 120
SHARD_SIZE = 3
SHARDS = SAMPLES // SHARD_SIZE
BATCH = 10
STEPS = 48
"""Four epochs exactly."""
EVERY = 4
"""Steps between checkpoints."""
SEED = 5
WINDOW = 4


def write_source(folder: Path) -> None:
    """Write the first digits, one folder per class."""
    images, labels = digits_images(32)
    for number in range(SAMPLES):
        path = folder / f"digit{labels[number]}" / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images[number]).save(path)


@dataclass(frozen=True)
class Workload:
    """A command with its source and target."""

    source: str
    """Images of an extraction, store of a training."""
    target: str
    """The store, or the folder of runs."""
    address: str | None = None
    """Address of the Ray cluster to join; default: a private one."""

    name = ""
    total = 0
    """Units of progress: shards, or steps."""

    def command(self) -> list[str]:
        return [sys.executable, *self._arguments(), *self._cluster_arguments()]

    def progress(self) -> int:
        """Finished units that are visible now."""
        raise NotImplementedError

    def _arguments(self) -> list[str]:
        raise NotImplementedError

    def _cluster_arguments(self) -> list[str]:
        return ["--ray-address", self.address] if self.address else []


class Extraction(Workload):
    name = "extraction"
    total = SHARDS

    def progress(self) -> int:
        return sum(name.startswith("shard-") for name in files.names(f"{self.target}/commits"))

    def _arguments(self) -> list[str]:
        demo = PRESETS["demo"]
        teacher = demo["teacher"]
        options = {
            "dataset": "folder",
            "source": self.source,
            "store": self.target,
            "shard-size": SHARD_SIZE,
            "batch-size": 1,
            "cut": "activations",
            "resolution": demo["resolution"],
            "autoencoder": "demo",
            "layers": "2-5",
            "actors": 2,
            "cpus-per-actor": 1,
            "teacher.model": teacher["model"],
            "teacher.weights": "demo",
            "teacher.image-size": teacher["image_size"],
        }
        for name, value in teacher["model_args"].items():
            options[f"teacher.model-args.{name.replace('_', '-')}"] = value
        return ["-m", "pipeline.extract", *words(options)]


class Training(Workload):
    name = "training"
    total = STEPS

    def progress(self) -> int:
        return max((row["step"] for row in self.rows()), default=0)

    def rows(self) -> list[dict[str, float]]:
        """Rows of the metrics that are written so far."""
        return parse_rows(files.read(f"{self.folder}/{METRICS}"))

    @property
    def folder(self) -> str:
        return f"{self.target}/demo"

    def _arguments(self) -> list[str]:
        options = {
            "config": "jobs/configs/demo.yaml",
            "store": self.source,
            "output": self.target,
            "seed": SEED,
            "steps": STEPS,
            "global-batch": BATCH,
            "log-every": 1,
            "workers.count": 2,
            # on several nodes each worker fills a node
            "workers.cpus-per-worker": 1 if self.address else 0.5,
            "checkpoint.every": EVERY,
            "data.window": WINDOW,
            "alignment.termination.step": STEPS // 2,
            "alignment.projector-width": 16,
        }
        return ["jobs/train_haste.py", *words(options)]


def words(options: Mapping[str, object]) -> list[str]:
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


def parse_rows(data: bytes) -> list[dict[str, float]]:
    """Complete rows; a partly written last row is skipped."""
    rows = []
    for line in data.decode(errors="replace").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows
