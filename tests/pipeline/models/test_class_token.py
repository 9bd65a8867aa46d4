"""SiT with a class token: sizes, initialisation, taps, and what it refuses."""

from __future__ import annotations

import pytest
import torch

from pipeline.models import SiT, Taps
from pipeline.models.flops import student_flops
from schemas.student import StudentConfig

PLAIN = StudentConfig(model="SiT-S/2", latent_size=8, num_classes=5, depth=2, width=24, heads=3)
CONFIG = PLAIN.model_copy(update={"class_token": 20})


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(3, 4, 8, 8), torch.rand(3), torch.tensor([0, 4, 5])


def test_it_starts_as_the_identity_with_outputs_of_0() -> None:
    """As in the authors' code: Xavier entry with bias 0, plain norm, output maps of 0."""
    student = SiT(CONFIG)
    x, t, y = inputs()
    out = student(x, t, y, Taps(feature_depth=2), torch.randn(3, 20))
    assert not out.prediction.any()
    assert not out.class_prediction.any()
    assert out.class_prediction.shape == (3, 20)
    assert out.features.shape == (3, 17, 24)
    limit = (6 / (20 + 24)) ** 0.5
    entry = student.cls_projectors2
    assert entry.weight.abs().max() <= limit
    assert entry.weight.std().item() == pytest.approx(limit / 3**0.5, rel=0.1)
    assert not entry.bias.any()
    assert (student.wg_norm.weight == 1).all()
    assert student.wg_norm.eps == 1e-6
    # blocks are the identity at the start: the class token has std 1 behind its norm
    token = out.features[:, 0]
    assert token.std(1, unbiased=False).tolist() == pytest.approx([1] * 3, rel=1e-3)


def test_other_weights_are_those_of_a_student_without_it() -> None:
    torch.manual_seed(1)
    plain = SiT(PLAIN)
    assert plain.state_dict().keys() == SiT(CONFIG).state_dict().keys() - {
        *(f"{n}.{leaf}" for n in ("cls_projectors2", "wg_norm") for leaf in ("weight", "bias")),
        "final_layer.linear_cls.weight",
        "final_layer.linear_cls.bias",
    }
    assert plain.final_layer.linear_cls is None
    x, t, y = inputs()
    assert plain(x, t, y).class_prediction is None


def test_attention_of_the_taps_is_that_of_patches() -> None:
    student = SiT(CONFIG)
    x, t, y = inputs()
    seen = {}
    student.blocks[1].register_forward_hook(lambda _, __, out: seen.update(pair=out[1]))
    out = student(x, t, y, Taps(attention_layers=(1,), heads=2), torch.randn(3, 20))
    ((q, k),) = out.attended
    assert q.shape == k.shape == (3, 2, 16, 8)
    assert torch.equal(q, seen["pair"].queries[:, :, 1:])
    assert torch.equal(k, seen["pair"].keys[:, :, 1:])
    assert out.attention_logits.shape == (3, 1, 2, 16, 16)


def test_each_sample_sees_its_own_token() -> None:
    student = SiT(CONFIG)
    for parameter in student.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    (x, t, y), tokens = inputs(), torch.randn(3, 20)
    with torch.no_grad():
        together = student(x, t, y, class_token_BE=tokens)
        other = student(x, t, y, class_token_BE=torch.cat([tokens[:2], tokens[:1]]))
        alone = student(x[1:2], t[1:2], y[1:2], class_token_BE=tokens[1:2])
    assert torch.allclose(together.prediction[1], alone.prediction[0], atol=1e-5)
    assert torch.allclose(together.class_prediction[1], alone.class_prediction[0], atol=1e-5)
    assert torch.allclose(together.prediction[:2], other.prediction[:2], atol=1e-5)
    assert not torch.allclose(together.prediction[2], other.prediction[2], atol=1e-3)


def test_a_missing_or_needless_token_is_refused() -> None:
    x, t, y = inputs()
    for config, token in ((CONFIG, None), (PLAIN, torch.randn(3, 20))):
        with pytest.raises(ValueError, match=r"goes with student\.class_token, and only with it"):
            SiT(config)(x, t, y, class_token_BE=token)


def test_its_flops_are_counted() -> None:
    """One token more in 2 blocks (12 D^2 weights a token, attention of 17 tokens for 16), its entry
    and its output."""
    extra = 2 * (2 * 12 * 24**2 + 2 * 2 * 24 * (17**2 - 16**2)) + 2 * 2 * 20 * 24
    assert student_flops(CONFIG) - student_flops(PLAIN) == extra
