"""Gradients clipped inside the fused optimizer, as on a GPU, against ``clip_grad_norm_``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.store import Store
from pipeline.train.optimizer import ClippedAdamW
from pipeline.train.trainer import Trainer
from tests.gpu.steps import open_steps

CPU = torch.device("cpu")


def trained(
    store: Store, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], *, folded: bool
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Results of 3 steps, then weights, and moments and step counts."""
    with monkeypatch.context() as patch, open_steps(store, CPU, changes) as steps:
        patch.setattr(ClippedAdamW, "clips_in_update", folded)
        results = steps.take(3)
        optimizer = steps.trainer.optimizer
        assert (getattr(optimizer, "grad_scale", None) is not None) == folded
        weights = [p.detach().clone() for p in steps.trainer.module.parameters()]
        moments = [v for state in optimizer.state.values() for v in state.values()]
        return results, weights, moments


def test_clipped_steps_agree_up_to_rounding(
    stores: Callable[..., Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"optimizer": {"max_grad_norm": 0.05, "eps": 1e-3, "learning_rate": 1e-2}}
    plain, folded = (
        trained(stores("maps"), monkeypatch, changes, folded=folded) for folded in (False, True)
    )
    assert plain[0][:, 4].min() > 0.1  # all steps are clipped; the norm before that is reported
    torch.testing.assert_close(folded[0], plain[0], rtol=1e-5, atol=1e-5)
    for got, expected in zip(folded[1] + folded[2], plain[1] + plain[2], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("limit", [1e6, float("inf")])
def test_unclipped_steps_agree_to_the_last_bit(
    stores: Callable[..., Store], monkeypatch: pytest.MonkeyPatch, limit: float
) -> None:
    changes = {"optimizer": {"max_grad_norm": limit}}
    plain, folded = (
        trained(stores("maps"), monkeypatch, changes, folded=folded) for folded in (False, True)
    )
    assert torch.equal(plain[0], folded[0])
    for got, expected in zip(folded[1] + folded[2], plain[1] + plain[2], strict=True):
        assert torch.equal(got, expected)


def test_a_step_that_is_not_finite_is_skipped(
    stores: Callable[..., Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    total = Trainer.total
    monkeypatch.setattr(ClippedAdamW, "clips_in_update", True)
    with open_steps(stores("maps"), CPU, {"train": {"on_nan": "skip_step"}}) as steps:
        steps.take(1)
        trainer = steps.trainer
        before = [p.detach().clone() for p in trainer.module.parameters()]
        moments = [v.clone() for s in trainer.optimizer.state.values() for v in s.values()]
        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "total", lambda self, losses: total(self, losses) * torch.nan)
            steps.take(1)
        assert trainer.skipped is not None
        assert bool(trainer.skipped)
        after = [v for s in trainer.optimizer.state.values() for v in s.values()]
        assert all(map(torch.equal, trainer.module.parameters(), before))
        assert all(map(torch.equal, after, moments))
        steps.take(1)
        assert not bool(trainer.skipped)
        assert not all(map(torch.equal, trainer.module.parameters(), before))
