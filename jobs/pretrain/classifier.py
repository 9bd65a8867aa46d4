"""Train a small image classifier: the judge of an experiment, which is not its teacher.

A Fréchet distance on the features of the very network that a student was pulled towards would
reward the pull. A judge that was trained apart, on labels, does not know the teacher.
"""

from __future__ import annotations

import math
import sys
import time
from typing import Annotated, Any

import timm
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.nn import functional as F

from jobs.pretrain.self_distill import normalise, parameter_groups, shuffled_batches


class ClassifierConfig(BaseModel):
    """What is trained and how."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Annotated[str, Field(description="of a timm network")] = "resnet18"
    steps: Annotated[int, Field(gt=0)] = 3000
    batch_size: Annotated[int, Field(gt=0)] = 128
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    warmup_steps: Annotated[int, Field(gt=0)] = 100
    shift: Annotated[int, Field(ge=0, description="pixels that crops are moved, at most")] = 4
    seed: int = 1


def train_classifier(
    images: Tensor, labels: Tensor, config: ClassifierConfig, device: torch.device | str = "cpu"
) -> nn.Module:
    """Train on uint8 ``images`` (N, 3, R, R) and int64 ``labels`` (N,), with mirrored and moved
    images; returns the network on the CPU."""
    torch.manual_seed(config.seed)
    classes = int(labels.max()) + 1
    model: nn.Module = timm.create_model(config.name, pretrained=False, num_classes=classes)
    model.to(device).train()
    optimizer = torch.optim.AdamW(
        parameter_groups(model, config.weight_decay), lr=config.learning_rate
    )
    batches = shuffled_batches(len(images), config.batch_size)
    start = time.perf_counter()
    for step in range(config.steps):
        factor = min(1.0, (step + 1) / config.warmup_steps)
        factor *= 0.5 * (1 + math.cos(math.pi * step / config.steps))
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * factor
        chosen = next(batches)
        pixels = _varied(images[chosen].to(device).float() / 255, config.shift)
        loss = F.cross_entropy(model(normalise(pixels)), labels[chosen].to(device))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if step % 100 == 0 or step == config.steps - 1:
            print(
                f"step {step:5d}  cross-entropy {loss.item():.3f}  "
                f"{time.perf_counter() - start:.0f} s",
                file=sys.stderr,
            )
    return model.cpu().eval()


@torch.inference_mode()
def accuracy(model: Any, images: Tensor, labels: Tensor) -> float:
    """Share of uint8 ``images`` (N, 3, R, R) that ``model`` names as ``labels`` (N,) do."""
    right = 0
    for batch, expected in zip(images.split(256), labels.split(256), strict=True):
        right += int((model(normalise(batch.float() / 255)).argmax(-1) == expected).sum())
    return right / len(labels)


def _varied(pixels: Tensor, shift: int) -> Tensor:
    """Half of the images mirrored, each moved by up to ``shift`` pixels."""
    batch, size, device = len(pixels), pixels.shape[-1], pixels.device
    mirrored = torch.rand(batch, 1, 1, 1, device=device) < 0.5
    pixels = torch.where(mirrored, pixels.flip(-1), pixels)
    padded = F.pad(pixels, (shift,) * 4, mode="reflect")
    place = torch.arange(size, device=device)
    rows = (torch.randint(2 * shift + 1, (batch, 1), device=device) + place)[:, None, :, None]
    columns = (torch.randint(2 * shift + 1, (batch, 1), device=device) + place)[:, None, None]
    number = torch.arange(batch, device=device)[:, None, None, None]
    channel = torch.arange(3, device=device)[None, :, None, None]
    return padded[number, channel, rows, columns]
