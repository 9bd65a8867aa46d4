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
@pytest.mark.parametrize("count", [10, 53, 200])
def test_torch_fidelity_agrees(count: int, batch: int) -> None:
    logits = 3 * torch.randn(count, 7, generator=torch.Generator().manual_seed(0))
    torch_fidelity = isc_features_to_metric(logits, splits=10, shuffle=True, rng_seed=2020)
    assert _score(logits, batch) == pytest.approx(torch_fidelity["inception_score_mean"], rel=1e-12)


def test_images_in_the_order_of_their_classes_have_the_score_of_any_order() -> None:
    """1,000 images of 10 classes, certain of their class: exp of the entropy of ten even classes is
    10. Each tenth of a sorted folder holds one class, which had a score of 1."""
    logits = 50 * torch.eye(10).repeat_interleave(100, 0)
    shuffled = logits[torch.randperm(1000, generator=torch.Generator().manual_seed(1))]
    assert _score(logits, 64) == pytest.approx(10, rel=0.1)
    assert _score(logits, 64) == pytest.approx(_score(shuffled, 64), rel=0.03)


def test_certain_and_even_classes_have_known_scores() -> None:
    logits = 1000 * torch.eye(5).repeat(20, 1)
    assert _score(logits, 16, splits=1) == pytest.approx(5)
    assert _score(torch.zeros(40, 5), 16) == pytest.approx(1)
    assert _score(torch.zeros(3, 5), 16) == pytest.approx(1)  # some splits are empty


def test_no_images_have_no_score() -> None:
    with pytest.raises(ValueError, match="no images"):
        InceptionScore(4).score()
