"""Student tensors on the teacher's grid, against closed forms."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pipeline.alignment.aligned_student import AlignedStudent
from pipeline.alignment.losses import Targets, attention_loss, feature_loss
from pipeline.alignment.resample import Grid, resample_features, resample_logits
from schemas.alignment import AlignmentConfig
from schemas.student import StudentConfig

DOWN, UP = ((16, 16), (14, 14)), ((14, 14), (16, 16))
EITHER_WAY = pytest.mark.parametrize(("source", "target"), [DOWN, UP, ((3, 5), (4, 2))])


def places(source: int, target: int) -> Tensor:
    """Where the target's pixel centres lie, in units of source pixels, kept inside."""
    centres = (torch.arange(target, dtype=torch.float64) + 0.5) * source / target - 0.5
    return centres.clamp(0, source - 1)


def matrix(source: Grid, target: Grid) -> Tensor:
    """Bilinear interpolation as a matrix (M, N): a product of one hat function per axis."""
    hats = [
        (1 - (places(s, t)[:, None] - torch.arange(s)).abs()).clamp(min=0)
        for s, t in zip(source, target, strict=True)
    ]
    return torch.kron(*hats)


def field(grid: Grid, rows: Tensor, columns: Tensor) -> Tensor:
    """A linear field at such rows and columns, in units of the grid: (1, N, 1)."""
    y, x = torch.meshgrid(rows / grid[0], columns / grid[1], indexing="ij")
    return (3 * y - 2 * x + 1).reshape(1, -1, 1)


def test_equal_grids_return_the_very_tensor() -> None:
    features, logits = torch.randn(2, 6, 5), torch.randn(2, 1, 3, 6, 6)
    assert resample_features(features, (2, 3), (2, 3)) is features
    assert resample_logits(logits, (2, 3), (2, 3)) is logits


def test_same_number_of_tokens_in_another_shape_is_another_grid() -> None:
    features = torch.randn(1, 6, 2, dtype=torch.float64)
    expected = matrix((2, 3), (3, 2)) @ features
    torch.testing.assert_close(resample_features(features, (2, 3), (3, 2)), expected)


@EITHER_WAY
def test_constant_fields_stay(source: Grid, target: Grid) -> None:
    n, m = source[0] * source[1], target[0] * target[1]
    features = torch.full((2, n, 3), 0.7)
    torch.testing.assert_close(
        resample_features(features, source, target), torch.full((2, m, 3), 0.7)
    )
    logits = torch.full((1, 2, 1, n, n), -1.5)
    torch.testing.assert_close(
        resample_logits(logits, source, target), torch.full((1, 2, 1, m, m), -1.5)
    )


@EITHER_WAY
def test_linear_fields_stay_linear_up_to_the_border(source: Grid, target: Grid) -> None:
    rows, columns = (torch.arange(n, dtype=torch.float64) for n in source)
    seen = [places(s, t) for s, t in zip(source, target, strict=True)]
    torch.testing.assert_close(
        resample_features(field(source, rows, columns), source, target), field(source, *seen)
    )


@EITHER_WAY
def test_features_match_the_interpolation_matrix(source: Grid, target: Grid) -> None:
    features = torch.randn(2, source[0] * source[1], 3, dtype=torch.float64)
    expected = matrix(source, target) @ features
    torch.testing.assert_close(resample_features(features, source, target), expected)


@EITHER_WAY
def test_logits_are_resampled_over_keys_and_queries(source: Grid, target: Grid) -> None:
    n = source[0] * source[1]
    logits = torch.randn(2, 2, 3, n, n, dtype=torch.float64)
    interpolation = matrix(source, target)
    over_keys = logits @ interpolation.T
    expected = interpolation @ over_keys
    torch.testing.assert_close(resample_logits(logits, source, target), expected)


@EITHER_WAY
def test_gradients_are_the_adjoint(source: Grid, target: Grid) -> None:
    n, m = source[0] * source[1], target[0] * target[1]
    logits = torch.randn(1, 1, 1, n, n, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(m, m, dtype=torch.float64)
    (resample_logits(logits, source, target) * weights).sum().backward()
    interpolation = matrix(source, target)
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad[0, 0, 0], interpolation.T @ weights @ interpolation)


@pytest.mark.parametrize("grid", [(3, 3), (6, 6), (4, 4)])
def test_student_is_aligned_on_the_teachers_grid(grid: Grid) -> None:
    student = StudentConfig(
        model="SiT-S/2", depth=3, width=24, heads=4, latent_size=8, num_classes=5
    )
    alignment = AlignmentConfig(
        feature_depth=2, student_layers=(0, 2), teacher_layers=(3, 1), projector_width=16
    )
    torch.manual_seed(0)
    module = AlignedStudent(student, alignment, teacher_width=10, heads=3, teacher_grid=grid)
    module.eval()
    tokens = grid[0] * grid[1]
    x, t, y = torch.randn(2, 4, 8, 8), torch.rand(2), torch.tensor([0, 5])
    targets = Targets(
        features=torch.randn(2, tokens, 10),
        attention=torch.softmax(torch.randn(2, 2, 3, tokens, tokens), -1),
    )
    losses = module(x, t, y, torch.zeros_like(x), targets)
    losses[1:3].sum().backward()
    assert module.student.blocks[0].attn.qkv.weight.grad.abs().sum() > 0

    out = module.student(x, t, y, module.taps)
    features = resample_features(out.features, (4, 4), grid)
    logits = resample_logits(out.attention_logits, (4, 4), grid)
    torch.testing.assert_close(
        losses[1:3],
        torch.stack(
            [
                feature_loss(module.projector(features), targets.features).sum(),
                attention_loss(logits, targets.attention).sum(),
            ]
        ),
    )
