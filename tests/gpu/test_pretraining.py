"""The pretraining loops on a GPU: no wait but for rows of the log."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipeline.pretrain import classifier, common, kl_autoencoder, options, self_distillation
from tests.gpu.fake_gpu import FakeGpu, needs_cuda_build

pytestmark = needs_cuda_build

SHORT = {"steps": 4, "batch_size": 4}
HEAD = {"hidden": 16, "bottleneck": 8, "prototypes": 8}


def distil(images: Tensor) -> None:
    backbone = {"embed_dim": 24, "depth": 1, "num_heads": 2}
    config = {**SHORT, **HEAD, "backbone": backbone}
    self_distillation.self_distill(images, options.SelfDistillConfig.model_validate(config), "cuda")


def classify(images: Tensor) -> None:
    config = options.ClassifierConfig.model_validate({**SHORT, "name": "resnet10t"})
    classifier.train_classifier(images, torch.arange(len(images)) % 3, config, "cuda")


def autoencode(images: Tensor) -> None:
    config = {**SHORT, "widths": [8, 8], "norm_groups": 4}
    kl_autoencoder.train_autoencoder(
        images, options.AutoencoderConfig.model_validate(config), "cuda"
    )


LOOPS = {self_distillation: distil, classifier: classify, kl_autoencoder: autoencode}


class Trained(Exception):  # noqa: N818
    """The steps are done; measurements of zeros would fail."""


@pytest.mark.parametrize("module", LOOPS, ids=lambda module: module.__name__.rpartition(".")[2])
def test_no_step_waits(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first of four steps is logged."""
    loop = LOOPS[module]
    waits: list[int] = []
    dtypes: set[torch.dtype] = set()
    update = torch.optim.AdamW.step

    def step(self: Any) -> None:
        update(self)
        waits.append(len(gpu.waits))
        if len(waits) == 4:
            raise Trained

    def note(layer: nn.Module, _: object, output: Tensor) -> None:
        if isinstance(layer, nn.Linear | nn.Conv2d):
            dtypes.add(output.dtype)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    monkeypatch.setattr(common, "LOG_EVERY", 10)
    hook = nn.modules.module.register_module_forward_hook(note)
    images = torch.randint(256, (12, 3, 32, 32), dtype=torch.uint8)
    try:
        with FakeGpu() as gpu, pytest.raises(Trained):
            loop(images)
    finally:
        hook.remove()
    assert [after - before for before, after in pairwise(waits)] == [1, 0, 0]
    assert gpu.races == []
    assert dtypes == {torch.bfloat16}
