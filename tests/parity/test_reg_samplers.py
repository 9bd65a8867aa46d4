"""REG's recorded sampler runs: the image and the class token are denoised together.

REG has no ODE sampler: the recorded ODE runs are REPA's sampler on the joint state.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.diffusion.samplers import State, sample_jointly
from pipeline.models import SiT
from schemas.diffusion import Convention, SamplerConfig
from tests.parity.reference import Golden
from tests.parity.reg import make_reg

FILE = "reg_sampler_io"


@pytest.fixture(scope="module")
def student(recipes: Golden) -> SiT:
    return make_reg(recipes)[0]


def sampler_config(recipes: Golden, run: dict[str, Any]) -> SamplerConfig:
    """The reference has one function for the ODE, which takes `heun`, and one for the SDE."""
    return SamplerConfig(
        method="sde" if "heun" not in run else "ode_heun" if run["heun"] else "ode",
        steps=recipes.configs["reg_sampler"]["num_steps"],
        guidance=run["cfg_scale"],
        guidance_low=run["guidance_low"],
        guidance_high=run["guidance_high"],
        class_guidance=run["cls_cfg_scale"],
    )


def test_states_of_a_run(recipes: Golden, student: SiT, reg_sampler_run: str) -> None:
    io, sampler = recipes.tensors(FILE), recipes.configs["reg_sampler"]
    run = sampler["runs"][reg_sampler_run]
    seen: list[tuple[Tensor, Tensor]] = []
    times: list[float] = []
    guided: list[bool] = []
    batch = len(io["labels"])

    def velocities(state: State, t: Tensor, labels: Tensor) -> State:
        times.append(t[0].item())
        seen.append((state[0][:batch], state[1][:batch]))
        guided.append(len(labels) > batch)
        out = student(state[0], t, labels, class_token_BE=state[1])
        return out.prediction, out.class_prediction

    latents, class_token = sample_jointly(
        velocities,
        [io["latents"], io["cls_latents"]],
        io["labels"],
        sampler_config(recipes, run),
        null_label=student.null_label,
        convention=Convention(path=run.get("path_type", "linear")),
        step_noise=lambda step: [io["sde_noise"][step], io["sde_cls_noise"][step]],
    )
    assert latents.dtype == class_token.dtype == torch.float64
    recipes.check(FILE, f"{reg_sampler_run}.latents", latents)
    recipes.check(FILE, f"{reg_sampler_run}.cls", class_token)
    asked = sampler["ode_times" if "heun" in run else "sde_times"][:-1]
    assert set(torch.tensor(asked, dtype=torch.float32).tolist()) == set(times)
    if "times" in run:
        assert times == pytest.approx(run["times"], abs=1e-7)
        assert guided == run["guidance_active_per_step"]
    step = 2 if run.get("heun") else 1  # of its two calls, Heun's first is at the state
    for part, name in enumerate(("trajectory", "cls_trajectory")):
        if f"{reg_sampler_run}.{name}" in io:
            states = torch.stack([state[part] for state in seen[::step]])
            recipes.check(FILE, f"{reg_sampler_run}.{name}", states)


def test_null_label_is_read(recipes: Golden, student: SiT) -> None:
    assert student.null_label == recipes.configs["reg_sampler"]["null_label"]


def test_some_run_has_a_trajectory(recipes: Golden) -> None:
    assert any(name.endswith(".cls_trajectory") for name in recipes.tensors(FILE))
