"""Attention pictures: the latent that a student receives, and places in other grids."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.models import make_student
from pipeline.visualization.attention import _same_place, student_attention
from schemas.alignment import AlignmentConfig
from schemas.diffusion import Convention, Path
from schemas.networks import AutoencoderInfo
from schemas.student import StudentConfig

LATENT = (4, 8, 8)
STORE: Any = SimpleNamespace(
    manifest=SimpleNamespace(
        autoencoder=AutoencoderInfo(
            name="x",
            kind="AutoencoderKL",
            weights_sha256="0" * 64,
            scaling_factor=0.5,
            shift_factor=0.25,
            latent_shape=LATENT,
        )
    )
)


@pytest.mark.parametrize(
    ("path", "alpha", "sigma"),
    [("linear", 0.8, 0.2), ("cosine", np.cos(np.pi / 10), np.sin(np.pi / 10))],
)
def test_a_student_sees_its_own_path(
    path: Path, alpha: float, sigma: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = StudentConfig(model="SiT-S/2", latent_size=8, num_classes=3, depth=2)
    student = make_student(config)
    student.convention = Convention(path=path)
    seen: list[torch.Tensor] = []
    forward = student.forward
    monkeypatch.setattr(student, "forward", lambda x, *rest: (seen.append(x), forward(x, *rest))[1])
    alignment = AlignmentConfig(student_layers=(1,), teacher_layers=(1,))
    mean = np.random.default_rng(0).standard_normal(LATENT).astype(np.float32)
    for latent in (mean, np.zeros_like(mean)):
        sample = {"mean": latent, "label": np.int64(1)}
        attention = student_attention(STORE, student, alignment, sample, heads=2)
        assert attention.shape == (16, 16)
    signal = alpha * 0.5 * torch.from_numpy(mean)  # the noise is equal in both
    torch.testing.assert_close((seen[0] - seen[1])[0], signal, rtol=1e-4, atol=1e-5)
    noise = (seen[1][0] + alpha * 0.5 * 0.25) / sigma
    assert abs(noise.std().item() - 1) < 0.1


def test_a_token_has_the_same_place_in_another_grid() -> None:
    assert [_same_place(token, (4, 4), (4, 4)) for token in range(16)] == list(range(16))
    assert _same_place(38, (8, 8), (4, 4)) == 2 * 4 + 3  # row 4, column 6
    assert _same_place(11, (4, 4), (8, 8)) == 5 * 8 + 7  # row 2, column 3


def test_a_class_token_is_seen_at_the_time_of_the_latent() -> None:
    config = StudentConfig(
        model="SiT-S/2", latent_size=8, depth=2, width=24, heads=2, class_token=300
    )
    student = make_student(config)
    seen: list[torch.Tensor] = []
    student.cls_projectors2.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    alignment = AlignmentConfig(student_layers=(1,), teacher_layers=(1,), feature_depth=1)
    sample = {"mean": np.zeros(LATENT, np.float32), "label": np.int64(1)}
    token = torch.linspace(-2, 2, 300)
    for clean in (token, torch.zeros(300)):
        attention = student_attention(STORE, student, alignment, sample, 2, clean)
        assert attention.shape == (16, 16)
        assert attention.sum(-1).tolist() == pytest.approx([1] * 16)
    torch.testing.assert_close(seen[0][0] - seen[1][0], 0.8 * token, rtol=1e-4, atol=1e-5)
    assert abs(seen[1].std().item() - 0.2) < 0.02
