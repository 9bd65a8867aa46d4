"""HASTE's recorded text-to-image sampler runs, of a tiny MM-DiT."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.checkpoints.reference_format import split_state
from pipeline.diffusion.samplers import sample
from pipeline.models.mmdit import MMDiT
from schemas.diffusion import SamplerConfig
from tests.parity.reference import Golden
from tests.parity.t2i import student_config

FILE = "t2i_sampler_io"


@pytest.fixture(scope="module")
def student(recipes: Golden) -> MMDiT:
    if not (recipes.folder / f"{FILE}.safetensors").is_file():
        pytest.skip(f"{recipes.folder} has no {FILE}")
    contexts = recipes.tensors("t2i_train_io")["contexts"]
    student = MMDiT(student_config(recipes))
    state = split_state(recipes.tensors("t2i_state")).student
    student.load_state_dict({**state, "null_context": contexts[-1]})
    return student.eval()


def sampler_config(recipes: Golden, run: dict[str, Any]) -> SamplerConfig:
    """The reference has one function for the ODE, which takes `heun`, and one for the SDE."""
    return SamplerConfig(
        method="sde" if "heun" not in run else "ode_heun" if run["heun"] else "ode",
        steps=recipes.configs["t2i_sampler"]["num_steps"],
        guidance=run["cfg_scale"],
        guidance_low=run["guidance_low"],
        guidance_high=run["guidance_high"],
    )


def test_latents_of_a_run(recipes: Golden, student: MMDiT, t2i_sampler_run: str) -> None:
    io, sampler = recipes.tensors(FILE), recipes.configs["t2i_sampler"]
    run = sampler["runs"][t2i_sampler_run]
    contexts = recipes.tensors("t2i_train_io")["contexts"]
    seen: list[tuple[float, Tensor]] = []

    def velocity(x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        seen.append((t[0].item(), x[0]))
        return student(x, t, context).prediction

    latents = sample(
        velocity,
        io["latents"],
        contexts[io["context_index"]],
        sampler_config(recipes, run),
        null_label=student.null_context,
        path=run.get("path_type", "linear"),
        step_noise=lambda step: io["sde_noise"][step],
    )
    assert latents.dtype == torch.float64
    recipes.check(FILE, t2i_sampler_run, latents)
    asked = sampler["ode_times" if "heun" in run else "sde_times"][:-1]
    assert set(torch.tensor(asked, dtype=torch.float32).tolist()) == {t for t, _ in seen}
    trajectory = f"{t2i_sampler_run}.trajectory_sample0"
    if trajectory in io:
        step = 2 if run.get("heun") else 1  # of its two calls, Heun's first is at the state
        recipes.check(FILE, trajectory, torch.stack([x for _, x in seen[::step]]))


@pytest.mark.usefixtures("student")
def test_some_run_has_a_trajectory(recipes: Golden) -> None:
    assert any(name.endswith(".trajectory_sample0") for name in recipes.tensors(FILE))
