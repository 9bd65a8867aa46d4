from __future__ import annotations

import pytest
import torch
from torch_fidelity.metric_isc import isc_features_to_metric

from pipeline.evaluate.inception_score import InceptionScore


def _score(logits: torch.Tensor, batch: int, **kwargs: int) -> float:
    score = InceptionScore(len(logits), **kwargs)
    for part in logits.split(batch):
        score.add(part)
    return score.score()


@pytest.mark.parametrize("batch", [1, 8, 100])
def test_torch_fidelity_agrees(batch: int) -> None:
    logits = 3 * torch.randn(53, 7, generator=torch.Generator().manual_seed(0))
    torch_fidelity = isc_features_to_metric(logits, splits=10, shuffle=False)
    assert _score(logits, batch) == pytest.approx(torch_fidelity["inception_score_mean"], rel=1e-12)


def test_certain_and_even_classes_have_known_scores() -> None:
    logits = 1000 * torch.eye(5).repeat(20, 1)
    assert _score(logits, 16) == pytest.approx(5)
    assert _score(torch.zeros(40, 5), 16) == pytest.approx(1)
    assert _score(torch.zeros(3, 5), 16) == pytest.approx(1)  # some splits are empty


def test_no_images_have_no_score() -> None:
    with pytest.raises(ValueError, match="no images"):
        InceptionScore(4).score()
