"""Schemas of the networks whose outputs a store holds: teacher, autoencoder, text encoder."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from schemas.base import Strict
from schemas.extract import Resize, TeacherSize
from schemas.fields import (
    Count,
    Finite,
    ModelArguments,
    ModelId,
    Place,
    Scale,
    Seed,
    Sha256,
    StoredLayers,
    is_none,
)

Size = Annotated[int, Field(ge=1, le=1 << 16)]

# The largest models that timm knows are 64 blocks deep and 4096 numbers, or 32 heads, wide.
MAX_DEPTH = 128
Depth = Annotated[int, Field(ge=1, le=MAX_DEPTH)]
Width = Annotated[int, Field(ge=1, le=1 << 13)]
Heads = Annotated[int, Field(ge=1, le=128)]
GridSide = Annotated[int, Field(ge=1, le=256)]
"""Patch tokens per row or column; the largest crop has 256, of 16 pixels each."""


class WeightsFile(Strict):
    """A safetensors file of weights in the store's root."""

    file: Annotated[str, Field(pattern=r"^[a-z0-9_]+\.safetensors$")]
    """Name below the store's root."""
    bytes: Count
    sha256: Sha256
    """SHA-256 of the file."""


class TeacherInfo(Strict):
    """The teacher whose targets the store holds."""

    model: ModelId
    model_args: ModelArguments
    weights: Place
    seed: Seed
    weights_sha256: Sha256
    image_size: TeacherSize
    mean: tuple[Finite, Finite, Finite]
    std: tuple[Scale, Scale, Scale]
    statistics_of: Literal["model", "options"] = Field(
        default="model", exclude_if=lambda source: source == "model"
    )
    """Source of mean and std: the model's name in timm, or options."""
    resize: Resize = Field(default="bicubic", exclude_if=lambda resize: resize == "bicubic")
    """Interpolation from the normalised crop to the input."""
    depth: Depth
    width: Width
    heads: Heads
    head_width: Width
    """Width of one head's query or key."""
    grid: tuple[GridSide, GridSide]
    """Patch tokens, rows x columns."""
    prefix: Annotated[int, Field(ge=0, le=1 << 10)]
    """Class and register tokens, which precede the patch tokens."""
    layers: StoredLayers = Field(default=(), exclude_if=lambda layers: not layers)
    """Layers whose attention the stream provides, 0-based; empty where it provides none."""

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> TeacherInfo:
        """Checked before a model is built, because a depth of 100,000 takes an hour to build."""
        if self.heads * self.head_width != self.width:
            raise ValueError(
                f"{self.heads} heads of {self.head_width} numbers are not a width of {self.width}"
            )
        if self.layers and self.layers[-1] >= self.depth:
            raise ValueError(f"there is no layer {self.layers[-1]} in a depth of {self.depth}")
        arguments = {"depth": self.depth}
        if self.layers:  # others may have a neck, and blocks without heads
            arguments |= {"embed_dim": self.width, "num_heads": self.heads}
        for name in ("depth_token_only", "cls_attn_layers"):  # blocks of CaiT and XCiT
            if name in self.model_args and self.model_args[name] not in range(MAX_DEPTH + 1):
                raise ValueError(f"model_args.{name} is not a number of blocks")
        for name, value in arguments.items():
            if self.model_args.get(name, value) != value:
                raise ValueError(f"model_args.{name} is not {value}, as the rest says")
        return self

    def same_network(self, other: TeacherInfo) -> bool:
        """True if equal images give equal tokens: the layers of the streams, and the place of the
        weights, may differ."""
        update = {"layers": (), "weights": ""}
        return self.model_copy(update=update) == other.model_copy(update=update)


AutoencoderKind = Literal[
    "AutoencoderKL",
    "AutoencoderTiny",
    "AsymmetricAutoencoderKL",
    "AutoencoderDC",
    "AutoencoderKLFlux2",
    "AutoencoderKLHunyuanImage",
    "AutoencoderKLQwenImage",
    "AutoencoderKLWan",
    "VQModel",
]
"""Classes of diffusers."""


class AutoencoderInfo(Strict):
    name: Place
    kind: AutoencoderKind
    weights_sha256: Sha256 | None
    """None: it was not run; the latents are those of the data set's source."""
    scaling_factor: Scale
    shift_factor: Finite
    latents_mean: tuple[Finite, ...] | None = Field(default=None, exclude_if=is_none)
    """One number per channel, which takes the place of the shift factor: students see
    (z - mean) * scaling_factor / std."""
    latents_std: tuple[Scale, ...] | None = Field(default=None, exclude_if=is_none)
    latent_shape: tuple[Size, Size, Size]
    """Channels, rows, columns."""

    @model_validator(mode="after")
    def _statistics_are_of_channels(self) -> AutoencoderInfo:
        lengths = [None if s is None else len(s) for s in (self.latents_mean, self.latents_std)]
        if lengths not in ([None] * 2, [self.latent_shape[0]] * 2):
            raise ValueError("latents_mean and latents_std do not have a number for each channel")
        return self


class TextEncoderInfo(Strict):
    """The text encoder of a stream of captions."""

    encoder: Place
    weights: Place
    seed: Seed
    model_args: ModelArguments
    weights_sha256: Sha256 | None
    """None: it was not run; the stream holds tokens, or the embeddings of the source."""
    tokenizer: Place
    tokenizer_sha256: Sha256 | None
    """SHA-256 of the tokenizer's vocabulary and rules; None: it was not run."""
    tokens: Annotated[int, Field(ge=1, le=1 << 12)]
    """Tokens of a caption, padding included."""
    width: Width
    """Numbers of a token's embedding."""
