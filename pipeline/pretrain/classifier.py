"""Train the evaluation classifier of an experiment: a small image classifier.

A Fréchet distance on the features of an experiment's teacher would reward students for being
aligned to that teacher. This classifier is trained on labels, independently of the teacher.
"""

from __future__ import annotations

from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.pretrain.common import (
    Updater,
    autocast,
    check_weights,
    copied_batches,
    normalise,
    parameter_groups,
)
from pipeline.pretrain.options import ClassifierConfig


def train_classifier(
    images: Tensor, labels: Tensor, config: ClassifierConfig, device: torch.device | str = "cpu"
) -> nn.Module:
    """Train on uint8 ``images`` (N, 3, R, R) and int64 ``labels`` (N,), with random flips and
    translations; returns the network on the CPU."""
    torch.manual_seed(config.seed)
    classes = int(labels.max()) + 1
    model: nn.Module = timm.create_model(config.name, pretrained=False, num_classes=classes)
    model.to(device).train()
    updater = Updater("classifier", parameter_groups(model, config.weight_decay), config)
    batches = copied_batches({"images": images, "labels": labels}, config.batch_size, device)
    for step in range(config.steps):
        batch = next(batches)
        pixels = _augment(batch["images"].float() / 255, config.shift, flip=config.flip)
        with autocast(device):
            scores = model(normalise(pixels))
        updater.update(step, F.cross_entropy(scores.float(), batch["labels"]))
    check_weights(model)
    return model.cpu().eval()


@torch.inference_mode()
def accuracy(model: Any, images: Tensor, labels: Tensor) -> float:
    """Fraction of uint8 ``images`` (N, 3, R, R) that ``model`` assigns to their ``labels`` (N,)."""
    correct = 0
    for batch, expected in zip(images.split(256), labels.split(256), strict=True):
        correct += int((model(normalise(batch.float() / 255)).argmax(-1) == expected).sum())
    return correct / len(labels)


def _augment(pixels: Tensor, shift: int, *, flip: bool) -> Tensor:
    """Flip about half of the images, if wanted, and translate each by at most ``shift`` pixels."""
    batch, size, device = len(pixels), pixels.shape[-1], pixels.device
    mirrored = torch.rand(batch, 1, 1, 1, device=device) < 0.5
    if flip:
        pixels = torch.where(mirrored, pixels.flip(-1), pixels)
    padded = F.pad(pixels, (shift,) * 4, mode="reflect")
    position = torch.arange(size, device=device)
    rows = (torch.randint(2 * shift + 1, (batch, 1), device=device) + position)[:, None, :, None]
    columns = (torch.randint(2 * shift + 1, (batch, 1), device=device) + position)[:, None, None]
    number = torch.arange(batch, device=device)[:, None, None, None]
    channel = torch.arange(3, device=device)[None, :, None, None]
    return padded[number, channel, rows, columns]
