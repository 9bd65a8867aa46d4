"""Self-distil a small vision transformer of DINOv2's architecture: the demo's teacher.

    python jobs/pretrain/self_distill.py [--steps N] [--out FILE]

DINO (arXiv 2104.14294): a student sees all crops of an image, a teacher only the large ones, and
the student learns to say what the teacher says about another crop of the same image. The teacher is
the student's moving average; centring and sharpening its output keep it from saying the same of
every image. No label is used in training; labels only score the result.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import timm
import torch
from pydantic import BaseModel, ConfigDict, Field
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parents[2]
if not __package__:  # run as a file: Python then looks beside this file, not in the repository root
    sys.path.insert(0, str(ROOT))

from pipeline.datasets.digits import digits_images

# The statistics that DINOv2, and so every reader of a teacher's input, normalises with.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class BackboneConfig(BaseModel):
    """The arguments of ``timm.create_model``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = "vit_small_patch14_dinov2"
    img_size: Annotated[int, Field(gt=0)] = 32
    patch_size: Annotated[int, Field(gt=0)] = 4
    embed_dim: Annotated[int, Field(gt=0)] = 96
    depth: Annotated[int, Field(gt=0)] = 6
    num_heads: Annotated[int, Field(gt=0)] = 6
    # The layer scale. DINOv2's 1e-5 would need far longer to wake up than this training lasts.
    init_values: Annotated[float, Field(gt=0)] = 0.3

    def arguments(self) -> dict[str, Any]:
        rest = self.model_dump(exclude={"name"})
        return {"model_name": self.name, "num_classes": 0, "dynamic_img_size": True, **rest}


class AugmentationConfig(BaseModel):
    """How crops differ. No flips of digits: a mirrored one is another digit, or none."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    global_area: tuple[float, float] = (0.5, 1.0)
    local_area: tuple[float, float] = (0.15, 0.5)
    local_size: Annotated[int, Field(gt=0, description="pixels, a multiple of the patch size")] = 16
    local_crops: Annotated[int, Field(ge=0)] = 4
    aspect: Annotated[float, Field(ge=1, description="largest ratio of the sides")] = 1.2
    degrees: Annotated[float, Field(ge=0)] = 12.0
    shear: Annotated[float, Field(ge=0)] = 0.15
    contrast: Annotated[float, Field(ge=0, lt=1)] = 0.4
    brightness: Annotated[float, Field(ge=0, description="in units of the full range")] = 0.2
    padding: Literal["zeros", "border", "reflection"] = "zeros"
    flip: bool = False
    colour: Annotated[float, Field(ge=0, lt=1, description="gain of each channel apart")] = 0.0


class SelfDistillConfig(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    backbone: BackboneConfig = BackboneConfig()
    augmentation: AugmentationConfig = AugmentationConfig()
    prototypes: Annotated[int, Field(gt=0)] = 512
    hidden: Annotated[int, Field(gt=0)] = 384
    bottleneck: Annotated[int, Field(gt=0)] = 64
    steps: Annotated[int, Field(gt=0)] = 1800
    batch_size: Annotated[int, Field(gt=0)] = 32
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    weight_decay: Annotated[float, Field(ge=0)] = 0.04
    warmup_steps: Annotated[int, Field(gt=0)] = 100
    frozen_last_steps: Annotated[int, Field(ge=0, description="of the head's last layer")] = 30
    clip: Annotated[float, Field(gt=0)] = 3.0
    momentum: Annotated[float, Field(gt=0, lt=1, description="the teacher's; rises to 1")] = 0.99
    student_temperature: Annotated[float, Field(gt=0)] = 0.1
    teacher_temperature: tuple[float, float] = (0.04, 0.05)
    teacher_temperature_steps: Annotated[int, Field(gt=0, description="of the rise")] = 300
    centre_momentum: Annotated[float, Field(gt=0, lt=1)] = 0.95
    seed: int = 0


class LayerReport(BaseModel):
    """One block's attention between patches, class row and column removed, averaged over heads."""

    entropy: float = Field(description="mean, as a fraction of log N: 1 is uniform, 0 is one-hot")
    logit_std: float = Field(description="over the keys of a query")
    head_distance: float = Field(description="total variation between two heads, 0 to 1")
    image_distance: float = Field(description="total variation to the mean map of all images")
    layer_scale: float = Field(description="mean absolute gamma, both branches")


class TeacherReport(BaseModel):
    knn: dict[str, float] = Field(description="leave-one-out accuracy by feature and k")
    patch_similarity: float = Field(description="mean cosine between two patches of an image")
    layers: list[LayerReport]


class Head(nn.Module):
    """DINO's projection head: three layers, an l2-normed bottleneck, unit-norm prototypes.

    It has the batch norms that DINO leaves optional: at first a small model's outputs hardly differ
    between images, and targets centred without having been spread out tend to the uniform.
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
        # A weight-normed layer whose gain is held at 1 is a layer of normalised rows.
        return F.linear(F.normalize(self.mlp(x), dim=-1), F.normalize(self.prototypes, dim=-1))


class Network(nn.Module):
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

    timm's std of 0.02 suits widths near 1000. At 96 it would leave every attention map uniform, and
    the class token blind to the image, for most of a short training.
    """
    for module in backbone.blocks.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=module.in_features**-0.5)
    nn.init.trunc_normal_(backbone.pos_embed, std=0.1)
    return backbone


def self_distill(
    images: Tensor, config: SelfDistillConfig, device: torch.device | str = "cpu"
) -> Any:
    """Train on uint8 ``images`` (N, 3, R, R); returns the teacher's backbone, its values float16.

    The values are rounded to float16 but held in float32 on the CPU, so that what is measured is
    what is saved.
    """
    torch.manual_seed(config.seed)
    student = Network(config).to(device)
    teacher = copy.deepcopy(student).requires_grad_(False)
    optimizer = torch.optim.AdamW(
        parameter_groups(student, config.weight_decay), lr=config.learning_rate
    )
    centre = torch.zeros(config.prototypes, device=device)
    size = config.backbone.img_size
    augmentation = config.augmentation
    running, start = torch.zeros((), device=device), time.perf_counter()

    batches = shuffled_batches(len(images), config.batch_size)

    for step in range(config.steps):
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * schedule(step, config)
        pixels = images[next(batches)].to(device).float() / 255
        area = augmentation.global_area
        views = torch.cat([crop(pixels, size, area, augmentation) for _ in range(2)])
        outputs = list(student(views).chunk(2))
        if augmentation.local_crops:
            local = [
                crop(pixels, augmentation.local_size, augmentation.local_area, augmentation)
                for _ in range(augmentation.local_crops)
            ]
            outputs += student(torch.cat(local)).chunk(len(local))

        with torch.no_grad():
            said = teacher(views)
            sharp = ((said - centre) / teacher_temperature(step, config)).softmax(-1)
            centre.lerp_(said.mean(0), 1 - config.centre_momentum)
        loss = distillation_loss(outputs, sharp.chunk(2), config.student_temperature)

        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if step < config.frozen_last_steps:
            student.head.prototypes.grad = None
        nn.utils.clip_grad_norm_(student.parameters(), config.clip)
        optimizer.step()
        follow(teacher, student, momentum(step, config))

        running = running + 0.02 * (loss.detach() - running) if step else loss.detach()
        if step % 100 == 0 or step == config.steps - 1:
            entropy = -(sharp * sharp.clamp_min(1e-12).log()).sum(-1).mean()
            spread = sharp.mean(0)
            spread_entropy = -(spread * spread.clamp_min(1e-12).log()).sum()
            print(
                f"step {step:5d}  loss {running.item():.3f}  teacher entropy {entropy:.2f} "
                f"(of its mean {spread_entropy:.2f})  {time.perf_counter() - start:.0f} s",
                flush=True,
            )
    backbone = teacher.backbone.eval().cpu()
    return backbone.half().float()


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Biases, norms and layer scales do not decay."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    return [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]


def shuffled_batches(count: int, size: int) -> Iterator[Tensor]:
    """Endless index batches: a new permutation each epoch, the ragged end dropped."""
    size = min(size, count)
    while True:
        yield from torch.randperm(count)[: count // size * size].split(size)


def schedule(step: int, config: SelfDistillConfig) -> float:
    """The learning rate's factor: linear warm-up, then a half cosine to zero."""
    warmup = min(1.0, (step + 1) / config.warmup_steps)
    return warmup * 0.5 * (1 + math.cos(math.pi * step / config.steps))


def momentum(step: int, config: SelfDistillConfig) -> float:
    """From the configured value to 1 along a half cosine."""
    return 1 - (1 - config.momentum) * 0.5 * (1 + math.cos(math.pi * step / config.steps))


def teacher_temperature(step: int, config: SelfDistillConfig) -> float:
    """A linear rise, then constant."""
    start, end = config.teacher_temperature
    return start + (end - start) * min(1.0, step / config.teacher_temperature_steps)


def distillation_loss(
    outputs: list[Tensor], targets: tuple[Tensor, ...], temperature: float
) -> Tensor:
    """Mean cross-entropy over all pairs of (target, output) that are not the same crop.

    ``outputs`` are the student's cosines (B, K), the large crops first; ``targets`` are the
    teacher's probabilities (B, K) for the large crops.
    """
    logs = [(output / temperature).log_softmax(-1) for output in outputs]
    pairs = [
        -(target * log).sum(-1).mean()
        for i, target in enumerate(targets)
        for j, log in enumerate(logs)
        if i != j
    ]
    return torch.stack(pairs).mean()


@torch.no_grad()
def follow(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), 1 - momentum)


def crop(
    pixels: Tensor, size: int, area: tuple[float, float], config: AugmentationConfig
) -> Tensor:
    """Random crops, turned, sheared and toned, one of each image: (B, 3, R, R) to (B, 3, S, S).

    Values come in as [0, 1] and go out normalised. Crop, rotation and shear are one affine map, so
    that an image is resampled only once. ``area`` is the range of the crop's share of the image.
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


def normalise(pixels: Tensor) -> Tensor:
    """[0, 1] to the teacher's input."""
    mean = pixels.new_tensor(IMAGENET_MEAN)[:, None, None]
    return (pixels - mean) / pixels.new_tensor(IMAGENET_STD)[:, None, None]


@torch.inference_mode()
def measure(backbone: Any, images: Tensor, labels: Tensor | None = None) -> TeacherReport:
    """Say what a backbone's features and attention are worth on uint8 ``images`` (N, 3, R, R)."""
    tokens, attention = [], []
    for batch in images.split(256):
        with AttentionLogits(backbone) as logits:
            tokens.append(backbone.forward_features(normalise(batch.float() / 255)))
        attention.append(torch.stack(logits.layers, 1))
    x = torch.cat(tokens)
    skip = backbone.num_prefix_tokens
    classes, patches = x[:, 0], x[:, skip:]
    features = {
        "class": classes,
        "mean patch": patches.mean(1),
        "pixels": images.flatten(1).float(),
    }
    knn: dict[str, float] = {}
    if labels is not None:
        for name, feature in features.items():
            knn |= {f"{name}, k={k}": knn_accuracy(feature, labels, k) for k in (10, 20)}
    unit = F.normalize(patches, dim=-1)
    count = patches.shape[1]
    # The sum over all pairs is the squared norm of the sum; the pairs of a patch with itself go.
    pairs = (unit.sum(1).square().sum(-1) - count) / (count * (count - 1))
    return TeacherReport(
        knn=knn,
        patch_similarity=pairs.mean().item(),
        layers=[
            describe_attention(torch.cat([a[:, i] for a in attention]), block)
            for i, block in enumerate(backbone.blocks)
        ],
    )


class AttentionLogits:
    """Collects each block's patch-to-patch logits (B, H, N, N) during forward passes inside it."""

    def __init__(self, backbone: Any) -> None:
        self.backbone = backbone
        self.layers: list[Tensor] = []

    def __enter__(self) -> AttentionLogits:
        self.hooks = [
            block.attn.qkv.register_forward_hook(self.keep(block.attn))
            for block in self.backbone.blocks
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self.hooks:
            hook.remove()

    def keep(self, attention: Any) -> Any:
        skip = self.backbone.num_prefix_tokens

        def hook(_module: nn.Module, _inputs: tuple[Tensor, ...], qkv: Tensor) -> None:
            shape = (*qkv.shape[:2], 3, attention.num_heads, -1)
            q, k, _ = qkv.reshape(shape)[:, skip:].permute(2, 0, 3, 1, 4)
            q, k = attention.q_norm(q), attention.k_norm(k)
            self.layers.append(q @ k.mT * attention.scale)

        return hook


def describe_attention(logits: Tensor, block: Any) -> LayerReport:
    """Summarise one block's logits (B, H, N, N)."""
    maps = logits.softmax(-1)
    entropy = -(maps * logits.log_softmax(-1)).sum(-1).mean() / math.log(maps.shape[-1])
    heads = maps.shape[1]
    distances = [
        total_variation(maps[:, i], maps[:, j]) for i in range(heads) for j in range(i)
    ] or [0.0]
    scales = torch.cat([block.ls1.gamma, block.ls2.gamma])
    return LayerReport(
        entropy=entropy.item(),
        logit_std=logits.std(-1).mean().item(),
        head_distance=sum(distances) / len(distances),
        image_distance=total_variation(maps, maps.mean(0)),
        layer_scale=scales.abs().mean().item(),
    )


def total_variation(p: Tensor, q: Tensor) -> float:
    return 0.5 * (p - q).abs().sum(-1).mean().item()


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
    backbone: Any, path: Path, config: SelfDistillConfig, report: TeacherReport
) -> None:
    """Write float16 weights under timm's names, with what made them in the header."""
    path.parent.mkdir(parents=True, exist_ok=True)
    weights = {name: value.half().contiguous() for name, value in backbone.state_dict().items()}
    metadata = {
        "format": "pt",
        "method": "DINO self-distillation, arXiv 2104.14294",
        "create_model": json.dumps(config.backbone.arguments()),
        "seed": str(config.seed),
        "steps": str(config.steps),
        "batch_size": str(config.batch_size),
        "knn": json.dumps({name: round(value, 4) for name, value in report.knn.items()}),
    }
    save_file(weights, path, metadata)


def summary(report: TeacherReport) -> str:
    lines = [f"k-NN accuracy, {name}: {value:.4f}" for name, value in report.knn.items()]
    lines.append(f"cosine between two patches of an image: {report.patch_similarity:.3f}")
    lines.append("layer  entropy/max  logit std  between heads  to mean map  layer scale")
    for i, layer in enumerate(report.layers):
        lines.append(
            f"{i:5d}  {layer.entropy:11.3f}  {layer.logit_std:9.2f}  {layer.head_distance:13.3f}"
            f"  {layer.image_distance:11.3f}  {layer.layer_scale:11.3f}"
        )
    return "\n".join(lines)


def main() -> None:
    defaults = SelfDistillConfig()
    parser = argparse.ArgumentParser(description="Self-distil the demo's teacher on the digits.")
    default_out = ROOT / "pipeline/assets/demo/teacher.safetensors"
    parser.add_argument("--out", type=Path, default=default_out)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--config", type=Path, help="JSON of a SelfDistillConfig; options win")
    for name in ("steps", "batch_size", "learning_rate", "momentum", "prototypes", "seed"):
        kind = type(getattr(defaults, name))
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind)
    parsed = vars(parser.parse_args())
    options = {name: value for name, value in parsed.items() if value is not None}
    out, file = options.pop("out"), options.pop("config", None)
    torch.set_num_threads(options.pop("threads"))
    written = json.loads(file.read_text()) if file else {}
    config = SelfDistillConfig.model_validate(written | options)

    digits, targets = digits_images(config.backbone.img_size)
    images, labels = torch.from_numpy(digits).permute(0, 3, 1, 2), torch.from_numpy(targets)
    start = time.perf_counter()
    backbone = self_distill(images, config)
    report = measure(backbone, images, labels)
    save_teacher(backbone, out, config, report)
    parameters = sum(p.numel() for p in backbone.parameters())
    print(f"{parameters:,} parameters, {time.perf_counter() - start:.0f} s, saved to {out}")
    print(summary(report))


if __name__ == "__main__":
    main()
