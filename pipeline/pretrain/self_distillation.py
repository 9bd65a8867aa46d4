"""Self-distillation of a small vision transformer of DINOv2's architecture.

DINO (arXiv 2104.14294): the student sees all crops of an image, the teacher only the large ones,
and the student learns to predict the teacher's output for another crop of the same image. The
teacher is the moving average of the student; its outputs are centred and sharpened, because they
would otherwise become the same for every image. Labels are not used in training; they only score
the result.
"""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file
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
from pipeline.pretrain.options import AugmentationConfig, BackboneConfig, SelfDistillConfig

RAW_PIXELS = "raw pixels"
"""Baseline of k-NN accuracies."""


class Head(nn.Module):
    """DINO's projection head: three layers, an l2-normed bottleneck, unit-norm prototypes.

    The batch norms that DINO leaves optional are on: at first the outputs of a small model hardly
    differ between images, and centring alone would make the targets uniform.
    """

    def __init__(self, width: int, hidden: int, bottleneck: int, prototypes: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(width, hidden, bias=False),
            nn.BatchNorm1d(hidden),
            nn.GELU(),
            nn.Linear(hidden, hidden, bias=False),
            nn.BatchNorm1d(hidden),
            nn.GELU(),
            nn.Linear(hidden, bottleneck),
        )
        self.prototypes = nn.Parameter(torch.randn(prototypes, bottleneck))

    def forward(self, x: Tensor) -> Tensor:
        """(B, D) to cosines with the prototypes, (B, K)."""
        x = self.mlp(x)
        # in float32, because a temperature of 0.04 multiplies rounding errors by 25
        with torch.autocast(x.device.type, enabled=False):
            # DINO's weight-normed layer with its gain fixed at 1 equals a layer of normalised rows.
            rows = F.normalize(self.prototypes, dim=-1)
            return F.linear(F.normalize(x.float(), dim=-1), rows)


class Network(nn.Module):
    """Backbone and projection head."""

    def __init__(self, config: SelfDistillConfig) -> None:
        super().__init__()
        self.backbone = init_narrow_vit(create_backbone(config.backbone))
        width = self.backbone.num_features
        self.head = Head(width, config.hidden, config.bottleneck, config.prototypes)

    def forward(self, crops: Tensor) -> Tensor:
        """(B, 3, S, S) to cosines with the prototypes, (B, K)."""
        cosines: Tensor = self.head(self.backbone(crops))
        return cosines


def create_backbone(config: BackboneConfig) -> Any:
    return timm.create_model(pretrained=False, **config.arguments())


@torch.no_grad()
def init_narrow_vit(backbone: Any) -> Any:
    """Initialise for a narrow model and a short training.

    timm's std of 0.02 suits widths near 1000. At width 96 every attention map would stay uniform,
    and the class token independent of the image, for most of a short training.
    """
    for module in backbone.blocks.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=module.in_features**-0.5)
    nn.init.trunc_normal_(backbone.pos_embed, std=0.1)
    return backbone


def self_distill(
    images: Tensor, config: SelfDistillConfig, device: torch.device | str = "cpu"
) -> Any:
    """Train on uint8 ``images`` (N, 3, R, R); returns the teacher's backbone on the CPU.

    Its values are rounded to float16 but have dtype float32, so that the accuracies measured are
    those of the saved weights.
    """
    torch.manual_seed(config.seed)
    student = Network(config).to(device)
    teacher = copy.deepcopy(student).requires_grad_(False)
    updater = Updater(
        "teacher", parameter_groups(student, config.weight_decay), config, clip=config.clip
    )
    centre = torch.zeros(config.prototypes, device=device)
    batches = copied_batches({"images": images}, config.batch_size, device)

    for step in range(config.steps):
        student.head.prototypes.requires_grad_(step >= config.frozen_last_steps)
        views, local = sample_crops(next(batches)["images"].float() / 255, config)
        with autocast(device):
            outputs = list(student(views).chunk(2))
            if local:
                outputs += student(torch.cat(local)).chunk(len(local))

        with torch.no_grad():
            with autocast(device):
                cosines = teacher(views)
            targets = ((cosines - centre) / teacher_temperature(step, config)).softmax(-1)
            centre.lerp_(cosines.mean(0), 1 - config.centre_momentum)
        loss = distillation_loss(outputs, targets.chunk(2), config.student_temperature)
        updater.update(step, loss)
        update_teacher(teacher, student, teacher_momentum(step, config))
    backbone = teacher.backbone.eval().cpu().half().float()
    check_weights(backbone)
    return backbone


def teacher_momentum(step: int, config: SelfDistillConfig) -> float:
    """The configured value, rising to 1 along a half cosine."""
    return 1 - (1 - config.momentum) * 0.5 * (1 + math.cos(math.pi * step / config.steps))


def teacher_temperature(step: int, config: SelfDistillConfig) -> float:
    """A linear rise, then constant."""
    start, end = config.teacher_temperature
    return start + (end - start) * min(1.0, step / config.teacher_temperature_steps)


def distillation_loss(
    outputs: list[Tensor], targets: tuple[Tensor, ...], temperature: float
) -> Tensor:
    """Mean cross-entropy over all pairs (target, output) of different crops.

    ``outputs`` are the student's cosines (B, K), the large crops first; ``targets`` are the
    teacher's probabilities (B, K) for the large crops.
    """
    log_probabilities = [(output / temperature).log_softmax(-1) for output in outputs]
    pairs = [
        -(target * log_probability).sum(-1).mean()
        for i, target in enumerate(targets)
        for j, log_probability in enumerate(log_probabilities)
        if i != j
    ]
    return torch.stack(pairs).mean()


@torch.no_grad()
def update_teacher(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """Move the teacher's weights towards the student's by 1 - ``momentum``."""
    torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), 1 - momentum)


def sample_crops(pixels: Tensor, config: SelfDistillConfig) -> tuple[Tensor, list[Tensor]]:
    """Two large crops of each image (2B, 3, S, S) and the small ones, each (B, 3, s, s)."""
    augmentation, size = config.augmentation, config.backbone.img_size
    views = [crop(pixels, size, augmentation.global_area, augmentation) for _ in range(2)]
    local = [
        crop(pixels, augmentation.local_size, augmentation.local_area, augmentation)
        for _ in range(augmentation.local_crops)
    ]
    return torch.cat(views), local


def crop(
    pixels: Tensor, size: int, area: tuple[float, float], config: AugmentationConfig
) -> Tensor:
    """One random crop of each image, rotated, sheared and with other tones: (B, 3, R, R) with
    values in [0, 1] to (B, 3, S, S) normalised.

    Crop, rotation and shear are one affine map, so that an image is resampled only once. ``area``
    is the range of the crop's share of the image.
    """
    batch = len(pixels)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.empty(batch, *shape, device=pixels.device).uniform_(low, high)

    share = uniform(*area)
    log_aspect = uniform(-1, 1) * math.log(config.aspect)
    width = (share * log_aspect.exp()).sqrt().clamp(max=1)
    height = (share / log_aspect.exp()).sqrt().clamp(max=1)
    angle = uniform(-1, 1) * math.radians(config.degrees)
    shear = uniform(-1, 1) * config.shear
    cos, sin = angle.cos(), angle.sin()
    x, y = uniform(-1, 1) * (1 - width), uniform(-1, 1) * (1 - height)
    # Rows map a crop's coordinates to the image's: rotation @ [[1, shear], [0, 1]] @ scale.
    affine = torch.stack(
        [
            torch.stack([cos * width, (cos * shear - sin) * height, x], -1),
            torch.stack([sin * width, (sin * shear + cos) * height, y], -1),
        ],
        dim=1,
    )
    if config.flip:
        affine[:, 0] *= uniform(-1, 1, 1).sign()
    grid = F.affine_grid(affine, [batch, 3, size, size], align_corners=False)
    crops = F.grid_sample(pixels, grid, padding_mode=config.padding, align_corners=False)

    contrast = (1 + uniform(-1, 1) * config.contrast)[:, None, None, None]
    brightness = (uniform(-1, 1) * config.brightness)[:, None, None, None]
    grey = crops.mean((1, 2, 3), keepdim=True)
    if config.colour:
        contrast = contrast * (1 + uniform(-1, 1, 3, 1, 1) * config.colour)
    return normalise((grey + contrast * (crops - grey) + brightness).clamp(0, 1))


@torch.inference_mode()
def extract_features(backbone: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    """Class tokens and means of the patch tokens, each (N, D), of uint8 ``images`` (N, 3, R, R)."""
    batches = [
        backbone.forward_features(normalise(batch.float() / 255)) for batch in images.split(256)
    ]
    tokens = torch.cat(batches)
    return tokens[:, 0], tokens[:, backbone.num_prefix_tokens :].mean(1)


def knn_accuracies(backbone: Any, images: Tensor, labels: Tensor, k: int = 20) -> dict[str, float]:
    """Leave-one-out k-NN accuracy by feature; raw pixels are the baseline."""
    classes, patches = extract_features(backbone, images)
    pixels = images.flatten(1).float()
    features = {
        "class token": classes,
        "mean patch": patches,
        RAW_PIXELS: pixels - pixels.mean(),
    }
    return {name: knn_accuracy(feature, labels, k) for name, feature in features.items()}


def knn_accuracy(features: Tensor, labels: Tensor, k: int) -> float:
    """Leave-one-out accuracy of the majority among the ``k`` nearest by cosine, votes unweighted.

    ``features`` (N, D), ``labels`` int64 (N,).
    """
    unit = F.normalize(features, dim=-1)
    similarity = (unit @ unit.mT).fill_diagonal_(-math.inf)
    neighbours = labels[similarity.topk(k).indices]
    votes = F.one_hot(neighbours, int(labels.max()) + 1).sum(1)
    return (votes.argmax(-1) == labels).float().mean().item()


def save_teacher(
    backbone: Any, path: Path, config: SelfDistillConfig, knn: dict[str, float]
) -> None:
    """Write float16 weights under timm's names; the file's metadata has options and accuracies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    weights = {name: value.half().contiguous() for name, value in backbone.state_dict().items()}
    metadata = {
        "format": "pt",
        "method": "DINO self-distillation, arXiv 2104.14294",
        "create_model": json.dumps(config.backbone.arguments()),
        "seed": str(config.seed),
        "steps": str(config.steps),
        "batch_size": str(config.batch_size),
        "knn": json.dumps({name: round(value, 4) for name, value in knn.items()}),
    }
    save_file(weights, path, metadata)
