"""The alignment losses, and which tensors meet in them, against closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from pipeline.alignment.aligned_student import LOSSES, AlignedStudent
from pipeline.alignment.losses import Targets, attention_entropy, attention_loss, feature_loss
from pipeline.models import SiT, Taps
from pipeline.targets.sources import MapsTargets, aligned_heads, wanted_targets
from schemas.alignment import AlignmentConfig
from schemas.store import Manifest
from schemas.student import StudentConfig
from tests.stores import HEADS, LAYERS, WIDTH, random_manifest

STUDENT = StudentConfig(model="SiT-S/2", depth=4, width=24, heads=4, latent_size=8, num_classes=5)


def alignment(student_layers: tuple[int, ...], teacher_layers: tuple[int, ...]) -> AlignmentConfig:
    return AlignmentConfig(
        feature_depth=2,
        student_layers=student_layers,
        teacher_layers=teacher_layers,
        projector_width=16,
    )


def maps_targets(manifest: Manifest, config: AlignmentConfig, heads: int) -> MapsTargets:
    return MapsTargets(*manifest.teacher_stream(), wanted_targets(config, heads))


def random_probs(*shape: int) -> torch.Tensor:
    return torch.softmax(2 * torch.randn(*shape), dim=-1)


# Feature loss


def test_perfect_features_lose_minus_one_at_any_scale() -> None:
    teacher = torch.randn(3, 5, 7)
    torch.testing.assert_close(feature_loss(2.5 * teacher, teacher), torch.full((3,), -1.0))
    torch.testing.assert_close(feature_loss(-teacher, teacher), torch.full((3,), 1.0))


def test_feature_loss_is_a_mean_over_tokens_per_sample() -> None:
    student = torch.tensor([[[1.0, 0], [0, 1]], [[1, 1], [1, 0]]])
    teacher = torch.tensor([[[3.0, 0], [5, 0]], [[1, 0], [2, 0]]])
    expected = torch.tensor([-0.5, -(0.5**0.5 + 1) / 2])
    torch.testing.assert_close(feature_loss(student, teacher), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_norms_neither_overflow_nor_vanish(dtype: torch.dtype) -> None:
    for size in (3e4, 1e-7):  # squares: beyond the largest half, below the smallest
        features = torch.full((1, 2, 768), size).to(dtype)
        torch.testing.assert_close(feature_loss(features, features), torch.tensor([-1.0]))


def test_a_token_of_zeros_has_no_direction_and_a_finite_gradient() -> None:
    student = torch.zeros(1, 1, 4, requires_grad=True)
    loss = feature_loss(student, torch.ones(1, 1, 4))
    loss.sum().backward()
    assert loss.item() == 0
    assert torch.isfinite(student.grad).all()


# Attention loss


def test_perfect_attention_loses_the_teachers_entropy() -> None:
    logits = 3 * torch.randn(2, 3, 4, 5, 5)
    teacher = torch.softmax(logits, dim=-1)
    entropy = -(teacher * teacher.log()).sum(-1).mean((1, 2, 3))
    torch.testing.assert_close(attention_loss(logits, teacher), entropy)
    torch.testing.assert_close(attention_entropy(teacher), entropy)
    # and no student loses less
    assert (attention_loss(logits + torch.randn_like(logits), teacher) > entropy).all()


def test_uniform_rows() -> None:
    uniform = torch.full((2, 1, 3, 8, 8), 1 / 8)
    log8 = torch.full((2,), math.log(8))
    torch.testing.assert_close(attention_loss(torch.full_like(uniform, 7.0), uniform), log8)
    torch.testing.assert_close(attention_entropy(uniform), log8)
    # a uniform teacher averages the student's log-probabilities
    logits = torch.randn(2, 1, 3, 8, 8)
    expected = -torch.log_softmax(logits, -1).mean((1, 2, 3, 4))
    torch.testing.assert_close(attention_loss(logits, uniform), expected)


def test_a_certain_teacher_asks_for_one_key() -> None:
    logits = torch.randn(1, 1, 1, 6, 6)
    keys = torch.tensor([3, 0, 5, 1, 1, 2])
    teacher = torch.nn.functional.one_hot(keys, 6).float().view(1, 1, 1, 6, 6)
    expected = torch.nn.functional.cross_entropy(logits[0, 0, 0], keys)
    torch.testing.assert_close(attention_loss(logits, teacher), expected.view(1))
    assert attention_entropy(teacher).item() == 0  # not 0 log 0


def test_attention_gradient_is_the_difference_of_the_rows() -> None:
    logits = torch.randn(2, 3, 2, 4, 4, requires_grad=True)
    teacher = random_probs(2, 3, 2, 4, 4)
    attention_loss(logits, teacher).sum().backward()
    assert logits.grad is not None
    rows = 3 * 2 * 4  # of one sample
    torch.testing.assert_close(logits.grad, (logits.detach().softmax(-1) - teacher) / rows)


def test_attention_loss_is_float32_whatever_the_logits() -> None:
    logits, teacher = 4 * torch.randn(2, 1, 2, 6, 6), random_probs(2, 1, 2, 6, 6)
    half = attention_loss(logits.bfloat16(), teacher)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, attention_loss(logits.bfloat16().float(), teacher))


# Which heads and layers meet


@pytest.fixture
def manifest() -> Manifest:
    return random_manifest(samples=2, shard_size=2)


def test_as_many_heads_as_both_have(manifest: Manifest) -> None:
    teacher = manifest.teacher_stream()[1].teacher
    for heads, expected in ((2, 2), (3, 3), (4, 3)):
        student = STUDENT.model_copy(update={"heads": heads})
        assert aligned_heads(student, teacher) == expected == min(heads, HEADS)


def test_students_first_heads_are_tapped() -> None:
    torch.manual_seed(0)
    student = SiT(STUDENT).eval()
    x, t, y = torch.randn(2, 4, 8, 8), torch.rand(2), torch.tensor([1, 2])
    every = student(x, t, y, Taps(attention_layers=(1,), heads=4)).attention_logits
    first = student(x, t, y, Taps(attention_layers=(1,), heads=2)).attention_logits
    torch.testing.assert_close(first, every[:, :, :2])


@pytest.mark.parametrize("teacher_layers", [(1, 2, 3), (3, 1), (2, 2), (3,)])
def test_teacher_layers_come_in_the_order_of_the_map(
    manifest: Manifest, teacher_layers: tuple[int, ...]
) -> None:
    tokens = 16
    attention = random_probs(2, len(LAYERS), HEADS, tokens, tokens)
    columns = {"features": torch.randn(2, tokens, WIDTH), "attention": attention}
    config = alignment(tuple(range(len(teacher_layers))), teacher_layers)
    targets = maps_targets(manifest, config, heads=2)(columns)
    assert targets.attention is not None
    assert targets.attention.shape[:3] == (2, len(teacher_layers), 2)
    for place, layer in enumerate(teacher_layers):
        torch.testing.assert_close(
            targets.attention[:, place], attention[:, LAYERS.index(layer), :2]
        )


def test_stored_probabilities_are_normalised_again(manifest: Manifest) -> None:
    attention = random_probs(2, len(LAYERS), HEADS, 16, 16).half()
    columns = {"features": torch.randn(2, 16, WIDTH), "attention": attention}
    targets = maps_targets(manifest, alignment((0, 1), (1, 2)), heads=HEADS)(columns)
    assert targets.attention is not None
    torch.testing.assert_close(
        targets.attention.sum(-1), torch.ones(2, 2, HEADS, 16), rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("teacher_layers", [(2, 3), (3, 1)])
def test_each_student_layer_meets_its_own_teacher_layer(
    manifest: Manifest, teacher_layers: tuple[int, int]
) -> None:
    """A teacher made of the student's own maps, stored where the layer map will look for them, is
    fitted perfectly: the loss is its entropy."""
    torch.manual_seed(0)
    config = alignment((1, 2), teacher_layers)
    module = AlignedStudent(
        STUDENT, config, teacher_width=WIDTH, heads=HEADS, measure_entropy=True
    ).eval()
    x, t, y = torch.randn(2, 4, 8, 8), torch.rand(2), torch.tensor([1, 2])
    stored = random_probs(2, len(LAYERS), HEADS, 16, 16)
    for student_layer, teacher_layer in zip((1, 2), teacher_layers, strict=True):
        taps = Taps(attention_layers=(student_layer,), heads=4)
        logits = module.student(x, t, y, taps).attention_logits
        stored[:, LAYERS.index(teacher_layer)] = logits[:, 0, :HEADS].softmax(-1).detach()
    source = maps_targets(manifest, config, heads=HEADS)
    features = torch.randn(2, 16, WIDTH)

    def losses(attention: torch.Tensor) -> dict[str, float]:
        targets = source({"features": features, "attention": attention})
        assert isinstance(targets, Targets)
        values = module(x, t, y, torch.zeros_like(x), targets)
        return dict(zip(LOSSES, values.tolist(), strict=True))

    fitted = losses(stored)
    np.testing.assert_allclose(fitted["attention"], fitted["teacher_entropy"], rtol=1e-6)
    crossed = losses(stored.flip(1))  # the same maps in other layers
    assert crossed["attention"] > crossed["teacher_entropy"] + 1e-3
