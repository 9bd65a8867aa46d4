"""Issue 3, parity 6: the recorded sampler runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.checkpoints.reference_format import split_state
from pipeline.diffusion.samplers import sample, sde_times
from pipeline.models import SiT
from schemas.diffusion import SamplerConfig
from tests.parity.reference import Golden
from tests.parity.students import student_config

FILE = "sampler_io"


@pytest.fixture(scope="module")
def student(golden: Golden) -> SiT:
    """The small SiT with the label table that the reference's samplers need."""
    table = golden.tensors(FILE)["label_table"]
    config = student_config(golden).model_copy(update={"num_classes": len(table) - 1})
    student = SiT(config)
    state = split_state(golden.tensors("sit_state")).student
    student.load_state_dict(state | {"y_embedder.embedding_table.weight": table})
    return student


def sampler_config(golden: Golden, name: str, run: dict[str, Any]) -> SamplerConfig:
    """The reference has one function for the ODE, which takes `heun`, and one for the SDE."""
    method = "sde" if "heun" not in run else "ode_heun" if run["heun"] else "ode"
    assert name.startswith(method[:3])
    return SamplerConfig(
        method=method,
        steps=golden.configs["sampler"]["num_steps"],
        guidance=run["cfg_scale"],
        guidance_low=run["guidance_low"],
        guidance_high=run["guidance_high"],
    )


def test_latents_of_a_run(golden: Golden, student: SiT, sampler_run: str) -> None:
    io, sampler = golden.tensors(FILE), golden.configs["sampler"]
    run = sampler["runs"][sampler_run]
    times: list[float] = []

    def velocity(x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        times.append(t[0].item())
        return student(x, t, labels).prediction

    latents = sample(
        velocity,
        io["latents"],
        io["labels"],
        sampler_config(golden, sampler_run, run),
        null_label=sampler["null_label"],
        path=run.get("path_type", "linear"),
        step_noise=lambda step: io["sde_noise"][step],
    )
    assert latents.dtype == torch.float64
    golden.check(FILE, sampler_run, latents)
    asked = sampler["ode_times" if "heun" in run else "sde_times"][:-1]
    assert set(torch.tensor(asked, dtype=torch.float32).tolist()) == set(times)


def test_sde_times(golden: Golden) -> None:
    sampler = golden.configs["sampler"]
    times = sde_times(sampler["num_steps"]).tolist()
    assert times == pytest.approx(sampler["sde_times"], abs=1e-15)
