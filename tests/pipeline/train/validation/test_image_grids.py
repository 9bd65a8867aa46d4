"""Grids of samples that a run draws during training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.autoencoders import Autoencoder
from pipeline.checkpoints.student import load_student
from pipeline.cli.config_files import merge
from pipeline.runs.metrics import read_metrics
from pipeline.sampling.generate import draw_images
from pipeline.store import Store
from pipeline.visualization.image_grid import save_grid
from schemas.errors import UserError
from schemas.run import RunConfig
from tests.processes import train_on
from tests.stores import tiny_run

SAMPLER = {"method": "ode", "steps": 2, "guidance": 1.5, "seed": 3}
SAMPLES = {"every": 2, "classes": (1, 4, 7), "per_class": 3, "batch_size": 2, "sampler": SAMPLER}
NAMES = ["step-000000002.png", "step-000000004.png", "step-000000005.png"]


@pytest.fixture
def config(digits_store: Store) -> RunConfig:
    """Five steps of a tiny student without a teacher, and a picture after every second."""
    changes: dict[str, Any] = {
        "store": digits_store.url,
        "steps": 5,
        "student": {"num_classes": 10},
        "alignment": {"feature_weight": 0, "attention_weight": 0, "termination": None},
        "checkpoint": {"every": 2, "keep": 9},
        "samples": SAMPLES,
    }
    return RunConfig.model_validate(merge(tiny_run(), changes))


def grids(folder: Path) -> dict[str, np.ndarray]:
    found = sorted((folder / "samples").iterdir())
    return {path.name: np.asarray(Image.open(path)) for path in found}


def test_grids_are_samples_of_the_averaged_weights(config: RunConfig, tmp_path: Path) -> None:
    train_on(1, config, tmp_path / "run")
    found = grids(tmp_path / "run")
    assert list(found) == NAMES
    student, state = load_student(tmp_path / "run" / "checkpoint-000000004")
    labels = [label for label in (1, 4, 7) for _ in range(3)]
    sampler = config.samples.sampler
    images = draw_images(student, Autoencoder(state.autoencoder.name), labels, sampler)
    expected = tmp_path / "expected.png"
    save_grid(images, expected, columns=3, row_names=["1", "4", "7"])
    difference = found[NAMES[1]].astype(int) - np.asarray(Image.open(expected)).astype(int)
    assert np.abs(difference).max() <= 1  # batches of another size round differently
    assert not np.array_equal(found[NAMES[0]], found[NAMES[1]])


def test_workers_draw_the_same_pictures_together(config: RunConfig, tmp_path: Path) -> None:
    """Two workers, also with shards of the weights, which agree with those of one up to summation
    order."""
    compute = config.compute.model_copy(update={"shard": "fsdp2"})
    train_on(1, config, tmp_path / "one")
    train_on(2, config, tmp_path / "two")
    train_on(2, config.model_copy(update={"compute": compute}), tmp_path / "shards")
    one = grids(tmp_path / "one")
    for run in ("two", "shards"):
        drawn = grids(tmp_path / run)
        assert list(drawn) == NAMES
        for name in NAMES:
            assert np.abs(one[name].astype(int) - drawn[name].astype(int)).max() <= 2


def test_grids_do_not_change_the_run(config: RunConfig, tmp_path: Path) -> None:
    """A resumed run draws the same grids."""
    train_on(1, config, tmp_path / "drawn")
    plain = config.model_copy(update={"samples": config.samples.model_copy(update={"every": None})})
    train_on(1, plain, tmp_path / "plain")
    assert not (tmp_path / "plain" / "samples").exists()

    def losses(folder: Path) -> list[float]:
        return [row["denoising"] for row in read_metrics(folder / "metrics.jsonl")]

    assert losses(tmp_path / "drawn") == losses(tmp_path / "plain")
    train_on(1, config, tmp_path / "resumed", stop_at=3)
    assert list(grids(tmp_path / "resumed")) == NAMES[:1]
    train_on(1, config, tmp_path / "resumed")
    resumed, whole = grids(tmp_path / "resumed"), grids(tmp_path / "drawn")
    assert all(np.array_equal(resumed[name], whole[name]) for name in NAMES)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"classes": (3, 10)},
            r"--samples.classes asks for class 10; the model has classes 0 to 9",
        ),
        ({"autoencoder": "/nowhere"}, r"--samples.autoencoder '/nowhere'"),
        ({"sampler": {"method": "ddpm"}}, r"set --samples.sampler.method sde, ode or ode_heun"),
    ],
)
def test_impossible_grids_are_refused_before_the_first_step(
    config: RunConfig, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    values = merge(config.model_dump(), {"samples": change})
    with pytest.raises(UserError, match=message):
        train_on(1, RunConfig.model_validate(values), tmp_path / "run")
    assert not list((tmp_path / "run").glob("checkpoint*"))


def test_grids_of_a_student_with_a_class_token(
    config: RunConfig, digits_store: Store, tmp_path: Path
) -> None:
    """Image and class token are drawn together."""
    _, stream = digits_store.manifest.class_stream()
    changes: dict[str, Any] = {
        "steps": 2,
        "student": {"class_token": stream.teacher.width},
        "samples": {"sampler": {"class_guidance": 0.5}},
    }
    config = RunConfig.model_validate(merge(config.model_dump(), changes))
    train_on(1, config, tmp_path / "run")
    (found,) = grids(tmp_path / "run").values()
    student, state = load_student(tmp_path / "run")
    labels = [label for label in (1, 4, 7) for _ in range(3)]
    images = draw_images(
        student, Autoencoder(state.autoencoder.name), labels, config.samples.sampler
    )
    save_grid(images, tmp_path / "expected.png", columns=3, row_names=["1", "4", "7"])
    expected = np.asarray(Image.open(tmp_path / "expected.png"))
    assert np.abs(found.astype(int) - expected.astype(int)).max() <= 1


def test_guidance_of_a_class_token_that_is_not_there_is_refused(
    config: RunConfig, tmp_path: Path
) -> None:
    changes: dict[str, Any] = {"samples": {"sampler": {"class_guidance": 0.5}}}
    config = RunConfig.model_validate(merge(config.model_dump(), changes))
    with pytest.raises(UserError, match=r"--samples.sampler.class-guidance is for a student that"):
        train_on(1, config, tmp_path / "run")
