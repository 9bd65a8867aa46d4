"""Networks that are trained for the demo and the experiment."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from pipeline.pretrain.classifier import train_classifier
from pipeline.pretrain.common import check_weights
from pipeline.pretrain.kl_autoencoder import train_autoencoder
from pipeline.pretrain.options import AutoencoderConfig, ClassifierConfig, SelfDistillConfig
from pipeline.pretrain.self_distillation import self_distill
from schemas.errors import NonFiniteError

PIXELS = torch.randint(0, 256, (16, 3, 32, 32), generator=torch.Generator().manual_seed(0)).byte()
LABELS = torch.arange(16) % 4
DEAD = {"steps": 3, "batch_size": 8, "warmup_steps": 1, "learning_rate": 1e30}


@pytest.mark.parametrize(
    ("train", "network"),
    [
        (lambda: train_classifier(PIXELS, LABELS, ClassifierConfig(**DEAD)), "classifier"),
        (lambda: train_autoencoder(PIXELS, AutoencoderConfig(**DEAD)), "autoencoder"),
        (lambda: self_distill(PIXELS, SelfDistillConfig(**DEAD)), "teacher"),
    ],
    ids=["classifier", "autoencoder", "teacher"],
)
def test_a_dead_training_returns_no_network(train: Any, network: str) -> None:
    with pytest.raises(
        NonFiniteError, match=f"the {network}'s loss is not finite at step 2 "
    ) as error:
        train()
    assert "\n" not in str(error.value)


def test_weights_that_the_last_step_broke_are_named() -> None:
    layer = nn.Linear(2, 2)
    check_weights(layer)
    with torch.no_grad():
        layer.bias[1] = float("inf")
    with pytest.raises(NonFiniteError, match="'bias' is not finite"):
        check_weights(layer)
