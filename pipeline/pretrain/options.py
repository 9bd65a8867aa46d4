"""Options of the trainings of this room, apart from them, so that ``--help`` needs no torch."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from schemas.base import Strict

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
CAPTIONS = ("a handwritten {}", "the digit {}", "{}")
"""Captions of a digit, by its name."""
PROMPTS = tuple(f"a handwritten {name}" for name in NAMES)


class BackboneConfig(Strict):
    """Arguments of ``timm.create_model``."""

    name: str = "vit_small_patch14_dinov2"
    img_size: Annotated[int, Field(gt=0)] = 32
    """Pixels per side of the large crops."""
    patch_size: Annotated[int, Field(gt=0)] = 4
    embed_dim: Annotated[int, Field(gt=0)] = 96
    depth: Annotated[int, Field(gt=0)] = 6
    num_heads: Annotated[int, Field(gt=0)] = 6
    init_values: Annotated[float, Field(gt=0)] = 0.3
    """Initial layer scale. DINOv2's 1e-5 needs a far longer training to grow."""

    def arguments(self) -> dict[str, Any]:
        rest = self.model_dump(exclude={"name"})
        return {"model_name": self.name, "num_classes": 0, "dynamic_img_size": True, **rest}


class AugmentationConfig(Strict):
    """Random variation of the crops. Digits are not flipped: a mirrored digit is another digit."""

    global_area: tuple[float, float] = (0.5, 1.0)
    """Range of a large crop's share of the image area."""
    local_area: tuple[float, float] = (0.15, 0.5)
    """Range of a small crop's share of the image area."""
    local_size: Annotated[int, Field(gt=0)] = 16
    """Pixels per side of a small crop, a multiple of the patch size."""
    local_crops: Annotated[int, Field(ge=0)] = 4
    aspect: Annotated[float, Field(ge=1)] = 1.2
    """Largest ratio of a crop's sides."""
    degrees: Annotated[float, Field(ge=0)] = 12.0
    shear: Annotated[float, Field(ge=0)] = 0.15
    contrast: Annotated[float, Field(ge=0, lt=1)] = 0.4
    """Largest relative change of contrast."""
    brightness: Annotated[float, Field(ge=0)] = 0.2
    """Largest change of brightness, as a fraction of the full range."""
    padding: Literal["zeros", "border", "reflection"] = "zeros"
    """Values outside the image, as in torch's ``grid_sample``."""
    flip: bool = False
    """Mirror half of the crops."""
    colour: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Largest relative change of one channel's contrast."""


class SelfDistillConfig(Strict):
    """Architecture and training of the teacher."""

    backbone: BackboneConfig = BackboneConfig()
    augmentation: AugmentationConfig = AugmentationConfig()
    prototypes: Annotated[int, Field(gt=0)] = 512
    """Outputs of the projection head."""
    hidden: Annotated[int, Field(gt=0)] = 384
    """Width of the head's hidden layers."""
    bottleneck: Annotated[int, Field(gt=0)] = 64
    """Width of the head's normalised layer."""
    steps: Annotated[int, Field(gt=0)] = 1800
    batch_size: Annotated[int, Field(gt=0)] = 32
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    weight_decay: Annotated[float, Field(ge=0)] = 0.04
    warmup_steps: Annotated[int, Field(gt=0)] = 100
    """Steps of the learning rate's linear rise."""
    frozen_last_steps: Annotated[int, Field(ge=0)] = 30
    """First steps in which the head's prototypes are not trained."""
    clip: Annotated[float, Field(gt=0)] = 3.0
    """Largest norm of the gradient."""
    momentum: Annotated[float, Field(gt=0, lt=1)] = 0.99
    """Initial momentum of the teacher; it rises to 1."""
    student_temperature: Annotated[float, Field(gt=0)] = 0.1
    """Softmax temperature of the student."""
    teacher_temperature: tuple[float, float] = (0.04, 0.05)
    """First and final softmax temperature of the teacher."""
    teacher_temperature_steps: Annotated[int, Field(gt=0)] = 300
    """Steps of the teacher temperature's linear rise."""
    centre_momentum: Annotated[float, Field(gt=0, lt=1)] = 0.95
    """Momentum of the centre of the teacher's outputs."""
    seed: int = 0


class AutoencoderConfig(Strict):
    """Architecture and training of the autoencoder."""

    widths: tuple[int, ...] = (16, 32, 32)
    """Channels of each level; every level after the first halves the resolution."""
    norm_groups: Annotated[int, Field(gt=0)] = 8
    """Groups of the group norms."""
    latent_channels: Annotated[int, Field(gt=0)] = 4
    steps: Annotated[int, Field(gt=0)] = 1500
    batch_size: Annotated[int, Field(gt=0)] = 64
    learning_rate: Annotated[float, Field(gt=0)] = 2e-3
    warmup_steps: Annotated[int, Field(gt=0)] = 50
    """Steps of the learning rate's linear rise."""
    kl_weight: Annotated[float, Field(ge=0)] = 1e-4
    """Weight of the divergence per latent value; L1 is per pixel value."""
    held_out: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Fraction of the images held out for the measurements."""
    seed: int = 0


class ClassifierConfig(Strict):
    """Architecture and training of the classifier."""

    name: str = "resnet18"
    """timm's name of the network."""
    steps: Annotated[int, Field(gt=0)] = 3000
    batch_size: Annotated[int, Field(gt=0)] = 128
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    warmup_steps: Annotated[int, Field(gt=0)] = 100
    """Steps of the learning rate's linear rise."""
    shift: Annotated[int, Field(ge=0)] = 4
    """Largest random translation of an image, pixels."""
    flip: bool = True
    """Mirror half of the images; not for digits."""
    seed: int = 1
