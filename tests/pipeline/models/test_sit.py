"""What SiT computes, and what it does not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import pipeline.models.taps as taps
from pipeline.models import SiT, Taps
from schemas.student import StudentConfig


@pytest.fixture
def student() -> SiT:
    config = StudentConfig(
        model="SiT-S/2", depth=4, width=24, heads=6, latent_size=8, num_classes=3
    )
    model = SiT(config).eval()
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def test_logits_are_computed_for_tapped_blocks_and_heads_only(
    student: SiT, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And only when they are asked for."""
    asked: list[int] = []
    plain = taps.attention_logits

    def counting(q: Tensor, k: Tensor) -> Tensor:
        asked.append(q.shape[1])
        return plain(q, k)

    monkeypatch.setattr(taps, "attention_logits", counting)
    x, t, y = torch.randn(2, 4, 8, 8), torch.rand(2), torch.tensor([0, 3])
    without = student(x, t, y)
    assert asked == []
    assert without.attention_logits is None
    assert without.features is None
    with_taps = student(x, t, y, Taps(feature_depth=2, attention_layers=(1, 3), heads=5))
    assert asked == []
    assert with_taps.attention_logits is not None
    assert asked == [5, 5]
    assert with_taps.attention_logits.shape == (2, 2, 5, 16, 16)
    assert torch.equal(with_taps.prediction, without.prediction)


def test_tapped_logits_are_those_that_make_the_output(student: SiT) -> None:
    attention = student.blocks[0].attn
    x = torch.randn(2, 16, 24)
    out, attended = attention(x, 6)
    v = attention.qkv(x).view(2, 16, 3, 6, 4)[:, :, 2].transpose(1, 2)
    by_hand = attention.proj((attended.logits.softmax(-1) @ v).transpose(1, 2).reshape(2, 16, 24))
    torch.testing.assert_close(out, by_hand, rtol=1e-5, atol=1e-6)


def test_a_fresh_student_predicts_nothing() -> None:
    """Blocks start as the identity and the last layer at 0 (DiT, arXiv 2212.09748)."""
    model = SiT(StudentConfig(model="SiT-S/8", depth=2, width=24, heads=6))
    x = torch.randn(1, 4, 32, 32)
    assert model(x, torch.rand(1), torch.tensor([5])).prediction.abs().max() == 0
    assert model(x, torch.rand(1), torch.tensor([1000])).prediction.shape == x.shape


@pytest.mark.parametrize(
    ("model", "latent", "parameters"),
    [
        ("SiT-XL/2", 32, 675e6),
        ("SiT-L/2", 32, 458e6),
        ("SiT-B/2", 32, 130e6),
        ("SiT-S/8", 64, 33e6),
    ],
)
def test_published_sizes(model: str, latent: int, parameters: float) -> None:
    """Parameter counts of SiT's table 1 (arXiv 2401.08740)."""
    with torch.device("meta"):
        student = SiT(StudentConfig.model_validate({"model": model, "latent_size": latent}))
    count = sum(parameter.numel() for parameter in student.parameters())
    assert count == pytest.approx(parameters, rel=0.01)
