"""Distributions of the training times."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pytest
import torch

from pipeline.diffusion.times import times_of
from pipeline.train.local import train_here
from pipeline.train.noise import draw
from schemas.diffusion import DiffusionConfig
from schemas.run import RunConfig
from tests.pipeline.train.test_loop import losses, run

SHAPE = (2, 2, 2)


@pytest.mark.parametrize("path", ["linear", "cosine"])
def test_lognormal_times(path: str) -> None:
    uniform = torch.tensor([0.0, 0.001, 0.25, 0.5, 0.9, 1 - 2**-24])
    t = times_of(DiffusionConfig(path=path, time="lognormal"), uniform)
    ratios = [math.exp(NormalDist().inv_cdf(u + 2**-25)) for u in uniform.tolist()]
    if path == "linear":
        expected = [r / (1 + r) for r in ratios]
    else:
        expected = [2 / math.pi * math.atan(r) for r in ratios]
    torch.testing.assert_close(t, torch.tensor(expected), rtol=1e-5, atol=1e-7)
    assert t.dtype == torch.float32
    assert ((t > 0) & (t < 1)).all()


def test_other_draws_of_a_sample_do_not_depend_on_the_distribution() -> None:
    positions = np.arange(500)
    diffusion = DiffusionConfig(time="lognormal")
    plain = draw(3, positions, SHAPE, 0.5)
    other = draw(3, positions, SHAPE, 0.5, partial(times_of, diffusion))
    uniform = draw(3, positions, SHAPE, 0.5, partial(times_of, DiffusionConfig()))
    assert all(torch.equal(a, b) for a, b in zip(plain[1:4], other[1:4], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(plain[:4], uniform[:4], strict=True))
    normal = torch.logit(other.t.double())
    assert normal.mean().abs() < 0.15
    assert 0.85 < normal.std() < 1.15
    part = draw(3, positions[7:9], SHAPE, 0.5, partial(times_of, diffusion))
    assert torch.equal(part.t, other.t[7:9])


def test_a_run_with_lognormal_times_is_resumed_bit_for_bit(
    run_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    config = run_config(steps=4, diffusion={"time": "lognormal"})
    run(config, tmp_path / "whole")
    for stop in (2, 4):
        train_here(config.model_copy(update={"steps": stop}), tmp_path / "parts")
    run(run_config(steps=4), tmp_path / "uniform")
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert losses(tmp_path / "uniform") != losses(tmp_path / "whole")
    assert "time" not in run_config().model_dump(mode="json")["diffusion"]


def test_dit_is_refused(run_config: Callable[..., RunConfig]) -> None:
    with pytest.raises(ValueError, match=r"diffusion\.time lognormal is for SiT"):
        run_config(student={"model": "DiT-S/2"}, diffusion={"time": "lognormal"})
