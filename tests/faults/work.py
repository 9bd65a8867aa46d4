"""The work that is disturbed, as a person would start it: one extraction, one training.

The set is small and real: scikit-learn's digits as PNG files, the demo's teacher and autoencoder.
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
    """The first digits, a folder for each class."""
    images, labels = digits_images(32)
    for number in range(SAMPLES):
        path = folder / f"digit{labels[number]}" / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images[number]).save(path)


@dataclass(frozen=True)
class Work:
    """A command, and where it leaves what it makes."""

    source: str
    """Of an extraction the images, of a training the store."""
    target: str
    """The store, or the folder of runs."""
    address: str | None = None
    """Ray cluster to join; default: a private one."""

    name = ""
    total = 0
    """Units of progress: shards, or steps."""

    def command(self) -> list[str]:
        return [sys.executable, *self._arguments(), *self._joined()]

    def progress(self) -> int:
        """Units done so far, as far as can be told now."""
        raise NotImplementedError

    def _arguments(self) -> list[str]:
        raise NotImplementedError

    def _joined(self) -> list[str]:
        return ["--ray-address", self.address] if self.address else []


class Extraction(Work):
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


class Training(Work):
    name = "training"
    total = STEPS

    def progress(self) -> int:
        return max((row["step"] for row in self.rows()), default=0)

    def rows(self) -> list[dict[str, float]]:
        """Of the metrics, as far as they are written."""
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
            # on several nodes one worker fills one of them
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
    """Whole rows; the last one may be under way."""
    rows = []
    for line in data.decode(errors="replace").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows
