"""REPA with several encoders, its cosine path and its lognormal times."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
import torch

from pipeline.checkpoints.reference_format import join_state, split_state
from pipeline.diffusion.times import lognormal_times
from schemas.alignment import AlignmentConfig, StreamAlignment
from schemas.diffusion import Path
from tests.parity.recipe_runs import (
    check_gradients,
    check_losses,
    loss_call,
    make_module,
    student_config,
)
from tests.parity.reference import Golden, check_close

FILE = "repa2_io"


def encoders(recipes: Golden) -> list[torch.Tensor]:
    io = recipes.tensors(FILE)
    return [io[f"teacher_features{n}"] for n in range(len(recipes.configs["repa2"]["z_dims"]))]


def alignment(recipes: Golden) -> AlignmentConfig:
    """REPA's mean over encoders: equal weights that sum to its coefficient."""
    sizes = recipes.configs["repa2"]
    count = len(sizes["z_dims"])
    options = {
        "feature_weight": sizes["proj_coeff"] / count,
        "attention_weight": 0,
        "feature_depth": sizes["encoder_depth"],
        "student_layers": (),
        "teacher_layers": (),
        "projector_width": sizes["projector_dim"],
    }
    others = [StreamAlignment.model_validate(options)] * (count - 1)
    return AlignmentConfig.model_validate({**options, "others": others})


def split_name(repa2_run: str) -> tuple[Path, str]:
    path, _, times = repa2_run.partition("_")
    return cast(Path, path), times


def times_of_run(recipes: Golden, repa2_run: str) -> torch.Tensor:
    io = recipes.tensors(FILE)
    path, times = split_name(repa2_run)
    return io["t"] if times == "uniform" else lognormal_times(path, io["time_normals"])


def test_times(recipes: Golden, repa2_run: str) -> None:
    expected = torch.tensor(recipes.values("repa2_loss_values")[repa2_run]["times"])
    check_close("times", times_of_run(recipes, repa2_run), expected, 2.4e-7)


@pytest.fixture
def run(recipes: Golden, repa2_run: str) -> SimpleNamespace:
    state, features = recipes.tensors("repa2_state"), encoders(recipes)
    module = make_module(
        student_config(recipes.configs["repa2"], state),
        alignment(recipes),
        split_state(state),
        [tensor.shape[-1] for tensor in features],
    )
    t = torch.tensor(recipes.values("repa2_loss_values")[repa2_run]["times"])
    return loss_call(module, split_name(repa2_run)[0], recipes.tensors(FILE), t, features)


def test_losses(recipes: Golden, repa2_run: str, run: SimpleNamespace) -> None:
    check_losses(run, recipes.values("repa2_loss_values")[repa2_run])
    recipes.check(FILE, f"{repa2_run}.velocity", run.velocity)
    single = [value for name, value in run.losses.items() if name.startswith("feature_")]
    mean = float(np.mean([value.item() for value in single]))
    assert len(single) == len(recipes.configs["repa2"]["z_dims"])
    assert mean == pytest.approx(run.losses["feature"].item(), abs=1e-6)


def test_gradients(recipes: Golden, repa2_run: str, run: SimpleNamespace) -> None:
    expected = recipes.values("repa2_loss_values")[repa2_run]
    check_gradients(recipes, FILE, f"{repa2_run}.grad.", run, expected)


def test_every_projector_is_read_and_written(recipes: Golden) -> None:
    state = recipes.tensors("repa2_state")
    parts = split_state(state)
    assert 1 + len(parts.others) == len(recipes.configs["repa2"]["z_dims"])
    written = join_state(parts)
    assert list(written) == list(join_state(split_state(written)))
    assert written.keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in written.items())
