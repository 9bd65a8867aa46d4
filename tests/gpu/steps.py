"""Steps of both phases on a device, as the training loop takes them."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.cli.config_files import merge
from pipeline.distributed.process_group import ProcessGroup
from pipeline.store import Batch, BatchLoader, SampleOrder, Store
from pipeline.train.gradient_probe import GradientProbe
from pipeline.train.trainer import Trainer
from schemas.run import RunConfig
from tests.stores import add_class_stream, add_text_stream

RUN: dict[str, Any] = {
    "steps": 6,
    "global_batch": 4,
    "log_every": 1,
    "student": {
        "model": "SiT-S/2",
        "depth": 3,
        "width": 48,
        "heads": 6,
        "num_classes": 10,
        "latent_size": 8,
    },
    "alignment": {
        "feature_depth": 2,
        "student_layers": [0, 1],
        "teacher_layers": [3, 5],
        "projector_width": 32,
        "termination": {"kind": "fixed", "step": 3},
    },
    "compute": {"compile": "off"},
    "data": {"window": 1, "threads": 1},
}
"""A run on stores of ``tests.encoded``."""


def reg(store: Store) -> tuple[Store, dict[str, Any]]:
    """A store with class tokens, and the option of a student that denoises them."""
    store = store if store.manifest.class_streams else add_class_stream(_copy(store, "reg"))
    _, stream = store.manifest.class_stream()
    return store, {"student": {"class_token": stream.teacher.width}}


def text(store: Store) -> tuple[Store, dict[str, Any]]:
    """A store with captions, and the options of a student that reads them."""
    store = store if store.manifest.text_streams else add_text_stream(_copy(store, "text"))
    encoder = store.manifest.text_stream()[1].encoder
    sizes = {"text_tokens": encoder.tokens, "text_width": encoder.width}
    return store, {"student": {"model": "MMDiT-3/2", **sizes}}


def _copy(store: Store, name: str) -> Store:
    """A copy beside the store, which other tests use without the stream to add."""
    folder = Path(store.root).with_name(name)
    shutil.copytree(store.root, folder, dirs_exist_ok=True)
    return Store.open(str(folder))


def run_config(store: Store, changes: dict[str, Any]) -> RunConfig:
    return RunConfig.model_validate(merge({**RUN, "store": store.url}, changes))


class Steps:
    """A trainer with its loader, both opened."""

    def __init__(self, store: Store, config: RunConfig, device: torch.device) -> None:
        group = ProcessGroup(device=device)
        self.trainer = Trainer(config, store, group, measure_entropy=config.alignment.active)
        self.order = SampleOrder(config.seed, store.index().samples_per_shard, config.data.window)
        self.teacher_streams = self.trainer.teacher_streams
        self.loader = BatchLoader(
            store,
            [*self.trainer.inputs.streams, *self.teacher_streams],
            self.order,
            global_batch=config.global_batch,
            threads=config.data.threads,
            allocate=self.trainer.inputs.feed.allocate,
        )
        self.probe = GradientProbe(self.trainer, store, self.order)
        self._batches: Iterator[Batch] = iter(self.loader)

    def take(self, count: int) -> Tensor:
        """The results of so many steps, (count, 5), on the device."""
        return torch.stack([self.trainer.train_step(self.next_batch()) for _ in range(count)])

    def next_batch(self) -> Batch:
        return next(self._batches)

    def terminate(self) -> None:
        self.loader.close_streams(self.teacher_streams)
        self.trainer.terminate({})


@contextmanager
def open_steps(
    store: Store, device: torch.device, changes: dict[str, Any] | None = None
) -> Iterator[Steps]:
    steps = Steps(store, run_config(store, changes or {}), device)
    try:
        yield steps
    finally:
        steps.loader.close()
        steps.trainer.close()
