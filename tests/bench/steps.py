"""Timed training steps: the real trainer on one batch in memory."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from pipeline.cli.config_files import merge, read_yaml
from pipeline.distributed.process_group import ProcessGroup
from pipeline.store import Batch, Store
from pipeline.targets.tail import first_tail_block, save_tail
from pipeline.teachers import Teacher
from pipeline.train.device_transfer import DevicePrefetcher
from pipeline.train.trainer import Trainer
from schemas.extract import Cut, TeacherConfig
from schemas.fields import CLASS
from schemas.networks import TeacherInfo, WeightsFile
from schemas.run import RunConfig
from schemas.store import Manifest
from schemas.streams import ClassStream, Column
from tests.bench.synthetic_stores import StoreSpec, dinov2_b, make_manifest, make_samples
from tests.bench.timing import Clock

CONFIGS = Path(__file__).parents[2] / "jobs" / "configs"
PLAIN = {"attention_loss": "plain", "optimizer": "plain"}


class Data(NamedTuple):
    """Input of the steps."""

    store: Store
    columns: dict[str, dict[str, np.ndarray]]
    batch: int


class Stepper(Protocol):
    """Takes training steps."""

    name: str

    def take(self, count: int) -> None:
        """Take ``count`` steps; on a GPU they may still be running on return."""

    def trace(self, folder: Path) -> None:
        """Write a trace of two steps."""


class TrainerSteps:
    """Steps of the trainer."""

    def __init__(self, name: str, trainer: Trainer, data: Data) -> None:
        self.name = name
        self.trainer = trainer
        self.data = data
        if trainer.group.device.type == "cuda":  # the loader reads into memory that is pinned
            self.data = data._replace(columns=pinned(data.columns, trainer.inputs.feed))

    def take(self, count: int) -> None:
        size = self.data.batch
        for _ in range(count):
            step = self.trainer.step
            positions = np.arange(step * size, (step + 1) * size, dtype=np.int64)
            self.trainer.train_step(Batch(step, positions, self.data.columns))

    def trace(self, folder: Path) -> None:
        trace(self, folder)


def pinned(
    columns: Mapping[str, Mapping[str, np.ndarray]], feed: DevicePrefetcher
) -> dict[str, dict[str, np.ndarray]]:
    """The same in memory of the feed."""

    def copy(array: np.ndarray) -> np.ndarray:
        memory = feed.allocate(array.nbytes).view(array.dtype).reshape(array.shape)
        memory[...] = array
        return memory

    return {
        stream: {part: copy(array) for part, array in arrays.items()}
        for stream, arrays in columns.items()
    }


def trace(stepper: Stepper, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as recorded:
        stepper.take(2)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    name = stepper.name.replace(", ", "-").replace(" ", "-")
    recorded.export_chrome_trace(str(folder / f"{name}.json"))


def run_configs(options: Any, store: Store | None) -> dict[str, RunConfig]:
    """Run config of each timed step, by the step's name."""
    size = options.student.partition("-")[2].partition("/")[0].lower()
    published = CONFIGS / f"sit_{'b' if size == 's' else size}2_haste.yaml"
    student = {"model": options.student, "depth": options.depth, "width": options.width}
    changes: dict[str, Any] = {
        "student": student,
        "store": store.url if store is not None else None,
        "precision": options.precision,
        "compute": {"compile": options.compile},
    }
    if options.depth is not None:  # the published pairs need more blocks
        pairs = {"feature_depth": 2, "student_layers": [0, 1], "teacher_layers": [10, 11]}
        changes["alignment"] = pairs
    values = merge(read_yaml(published), changes)
    vanilla = {"feature_weight": 0, "attention_weight": 0, "termination": None}
    configs = {
        "vanilla": merge(values, {"alignment": vanilla}),
        "phase 1": values,
        "phase 2": values,
    }
    for recipe in options.recipe:
        configs[f"phase 1, {recipe}"] = merge(read_yaml(CONFIGS / f"{recipe}.yaml"), changes)
    if options.plain:
        configs["phase 1, plain"] = merge(values, {"compute": PLAIN})
    return {name: RunConfig.model_validate(config) for name, config in configs.items()}


def make_stepper(
    name: str, configs: Mapping[str, RunConfig], data: Data, clock: Clock
) -> TrainerSteps:
    """Stepper with a new trainer; that of Phase II has taken a step of Phase I."""
    config = configs[name].model_copy(update={"global_batch": data.batch})
    stepper = TrainerSteps(
        name, Trainer(config, data.store, ProcessGroup(device=clock.device)), data
    )
    if name == "phase 2":
        stepper.take(1)
        stepper.trainer.terminate({})
    return stepper


def batch_of(options: Any, clock: Clock) -> int:
    return options.batch or (128 if clock.device.type == "cuda" else 4)


def make_data(folder: Path, options: Any, batch: int) -> Data:
    """A store without shards, and a batch with the contents of its shards."""
    teacher, tail = _teacher(folder, options.cut)
    spec = StoreSpec(options.cut, options.cut, "faithful", True, 1, batch)
    device = Clock.of(options.device).device.type
    manifest = make_manifest(spec, "webdataset", teacher, tail, device)
    samples = make_samples(manifest)
    columns: dict[str, dict[str, np.ndarray]] = {}
    for stream in manifest.streams:
        columns[stream] = {
            part: np.stack([samples[i % len(samples)][stream][part] for i in range(batch)])
            for part in samples[0][stream]
        }
    columns["latents"]["label"] = np.arange(batch, dtype=np.int64) % 5
    manifest = _with_class_stream(manifest)  # for recipes with a class token
    token = np.random.default_rng(0).standard_normal((batch, teacher.width)).astype(np.float16)
    columns[CLASS] = {"class_token": token}
    return Data(Store.create(str(folder), manifest), columns, batch)


def _with_class_stream(manifest: Manifest) -> Manifest:
    _, stream = manifest.teacher_stream()
    teacher = stream.teacher.model_copy(update={"layers": ()})
    tokens = {"class_token": Column(shape=(teacher.width,), codec="float16")}
    own = ClassStream(kind="class", columns=tokens, teacher=teacher, compute=stream.compute)
    return manifest.model_copy(update={"streams": {**manifest.streams, CLASS: own}})


def _teacher(folder: Path, cut: Cut) -> tuple[TeacherInfo, WeightsFile | None]:
    """DINOv2-B with random weights where the cut has a tail; else its description only."""
    layers = (7, 8, 9, 10, 11)
    first = first_tail_block(cut, layers)
    if first is None:
        return dinov2_b(layers), None
    teacher = Teacher(TeacherConfig(weights="random"), resolution=256, layers=layers)
    return teacher.info(), save_tail(teacher, str(folder), cut, first)


@contextmanager
def in_temporary_folder(options: Any, name: str) -> Iterator[Callable[[], TrainerSteps]]:
    """Yield a function that makes the stepper ``name``, after its data were created."""
    clock = Clock.of(options.device)
    with tempfile.TemporaryDirectory(prefix="haste-bench-") as folder:
        data = make_data(Path(folder), options, batch_of(options, clock))
        configs = run_configs(options, data.store)
        yield lambda: make_stepper(name, configs, data, clock)
