"""Bytes and FLOPs that the arithmetic bench counts, against those written down by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from schemas.errors import UserError
from tests.bench.arithmetic import Counting, Traffic, _other_sources

WEIGHTS = 1000


def test_operations() -> None:
    a, b = torch.ones(8, 4), torch.ones(4, 2)
    with Counting() as counting:
        half = (a + 1).to(torch.bfloat16)
        half.view(-1).t()
        a @ b
        a.mul_(2)
    counts = counting.by_name
    assert counts["add"] == Traffic(1, 0, 2 * 4 * 32)
    assert counts["_to_copy"] == Traffic(1, 0, (4 + 2) * 32)
    assert counts["mm"] == Traffic(1, 0, 4 * (32 + 8 + 16), flops=2 * 8 * 4 * 2)
    assert counts["mul_"] == Traffic(1, 0, 2 * 4 * 32)
    assert set(counts) == {"add", "_to_copy", "mm", "mul_"}
    total = counting.total()
    assert (total.launches, total.library, total.library_bytes) == (3, 1, 224)


@pytest.mark.parametrize(("scaled", "expected"), [(False, 28), (True, 32)])
def test_an_update(scaled: bool, expected: int) -> None:
    """AdamW reads weight, gradient and moments and writes all but the gradient, unless it scales
    that; the average reads two and writes one."""
    weight = torch.nn.Parameter(torch.ones(WEIGHTS))
    weight.grad = torch.ones(WEIGHTS)
    optimizer = torch.optim.AdamW([weight], fused=True, foreach=False)
    optimizer.step()
    if scaled:
        optimizer.grad_scale = torch.ones(())
    with Counting() as counting, torch.no_grad():
        optimizer.step()
        torch._foreach_lerp_([torch.ones(WEIGHTS)], [weight.data], 0.1)
    per_weight = {name: one.bytes / WEIGHTS for name, one in counting.by_name.items()}
    assert per_weight["_fused_adamw_"] == pytest.approx(expected, abs=0.02)
    assert per_weight["_foreach_lerp_"] == 12


def test_another_checkout_lends_its_sources(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a checkout"), _other_sources(tmp_path):
        pass
    (tmp_path / "pipeline").mkdir()
    with _other_sources(tmp_path) as folder:
        assert (folder / "pipeline").resolve() == tmp_path / "pipeline"
        assert (folder / "tests" / "bench" / "arithmetic.py").exists()
