"""Complete runs of a DiT, and samples from their checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from pipeline.autoencoders import Autoencoder
from pipeline.checkpoints.local import LocalCheckpoints
from pipeline.checkpoints.student import load_student
from pipeline.cli.config_files import read_yaml
from pipeline.models import DiT, make_student
from pipeline.runs.metrics import read_metrics
from pipeline.sampling.generate import draw_images
from pipeline.train.loop import train
from schemas.diffusion import SamplerConfig
from schemas.errors import UserError
from schemas.run import RunConfig
from schemas.validation import validate

Make = Callable[..., RunConfig]
CONFIGS = Path(__file__).parents[3] / "jobs" / "configs"


def run(config: RunConfig, folder: Path) -> list[dict[str, Any]]:
    """Train; returns the rows of the metrics without events."""
    train(config, folder, LocalCheckpoints(folder, keep=1).save)
    rows = read_metrics(folder / "metrics.jsonl")
    return [row for row in rows if "event" not in row]


@pytest.fixture
def dit_config(run_config: Make) -> Make:
    """A tiny HASTE run of a DiT: three steps with alignment, three without."""

    def make(**overrides: Any) -> RunConfig:
        student = {"model": "DiT-S/2", **overrides.pop("student", {})}
        return run_config(student=student, **overrides)

    return make


def test_trains_through_the_termination_and_draws(dit_config: Make, tmp_path: Path) -> None:
    rows = run(dit_config(), tmp_path / "a")
    assert [row["phase"] for row in rows] == [1, 1, 1, 2, 2, 2]
    assert all(("attention" in row) == (row["phase"] == 1) for row in rows)
    # the untrained prediction is 0: unit noise gives a loss of 1, the variances add a little
    assert 0.9 < rows[0]["denoising"] < 10
    student, _ = load_student(tmp_path / "a")
    assert isinstance(student, DiT)
    autoencoder = Autoencoder("demo")
    ddpm = SamplerConfig(method="ddpm", steps=4, guidance=1.5)
    images = draw_images(student, autoencoder, [1, 2, 3], ddpm)
    assert images.dtype == torch.uint8
    assert len(images) == 3
    alone = draw_images(student, autoencoder, [3], ddpm, first_index=2)
    assert (images[2:].int() - alone.int()).abs().max() <= 1  # batched matmuls round differently


def test_learns_the_noise_of_few_samples(dit_config: Make, tmp_path: Path) -> None:
    off = {"feature_weight": 0, "attention_weight": 0, "termination": None}
    rows = run(dit_config(alignment=off, steps=120, global_batch=16, log_every=40), tmp_path / "a")
    assert rows[-1]["denoising"] < 0.9 * rows[0]["denoising"]


def test_a_method_of_the_other_family_is_refused(dit_config: Make, run_config: Make) -> None:
    autoencoder = Autoencoder("demo")
    for make, method, needed in (
        (dit_config, "sde", "ddpm"),
        (run_config, "ddpm", "sde, ode or ode_heun"),
    ):
        student = make_student(make().student)
        with pytest.raises(UserError, match=rf"method {method} cannot draw .* {needed}$"):
            draw_images(student, autoencoder, [0], SamplerConfig(method=method, steps=2))


def test_cosine_path_is_refused(dit_config: Make) -> None:
    with pytest.raises(ValidationError, match=r"diffusion.path cosine is for SiT; DiT-S/2"):
        dit_config(diffusion={"path": "cosine"})


@pytest.mark.parametrize(
    ("name", "weights", "terminates"),
    [("haste", (0.5, 0.5), True), ("repa", (0.5, 0), False), ("vanilla", (0, 0), False)],
)
def test_published_configs(name: str, weights: tuple[float, float], terminates: bool) -> None:
    path = CONFIGS / f"dit_xl2_{name}.yaml"
    config = validate(RunConfig, read_yaml(path), where=str(path))
    assert config.name == path.stem
    assert config.student.size == (28, 1152, 16, 2)
    assert config.student.family == "DiT"
    alignment = config.alignment
    assert (alignment.feature_weight, alignment.attention_weight) == weights
    assert (alignment.termination is not None) == terminates
    assert alignment.teacher_layers == (8, 9, 10, 11)
