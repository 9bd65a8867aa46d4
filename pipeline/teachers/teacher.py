"""A timm vision transformer with taps on its attention."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.files import sha256_of_arrays
from pipeline.teachers.weights import load_weights
from schemas.errors import UserError
from schemas.extract import TeacherConfig
from schemas.store import TeacherInfo

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
PIXELS_PER_TOKEN = 16  # of the crop: an autoencoder's 8 times the student's patch of 2


class TeacherTargets(NamedTuple):
    """What one forward pass of the teacher gives the alignment (B images, N patches, L layers)."""

    features: Tensor
    """(B, N, D) patch tokens after the final norm."""
    class_token: Tensor
    """(B, D) class token after the final norm."""
    attention_logits: Tensor
    """(B, L, H, N, N) q k^T / sqrt(d), float32, rows and columns of class and register tokens
    removed, before the softmax (HASTE section 2.3)."""


class Teacher(nn.Module):
    """The frozen teacher: uint8 crops in, ``TeacherTargets`` out."""

    def __init__(self, config: TeacherConfig, *, resolution: int, layers: Sequence[int]) -> None:
        super().__init__()
        self.config = config
        self.layers = tuple(layers)
        self.vit = _create(config, resolution)
        self.weights_sha256 = sha256_of_arrays(
            (name, tensor.numpy()) for name, tensor in sorted(self.vit.state_dict().items())
        )
        cfg: dict[str, Any] = self.vit.pretrained_cfg
        self.mean = tuple(cfg.get("mean") or IMAGENET_MEAN)
        self.std = tuple(cfg.get("std") or IMAGENET_STD)
        self.image_size = int(self.vit.patch_embed.img_size[0])
        self.grid: tuple[int, int] = tuple(self.vit.patch_embed.grid_size)
        self.depth = len(self.vit.blocks)
        if self.layers and max(self.layers) >= self.depth:
            raise UserError(
                f"--layers asks for layer {max(self.layers)}; teacher '{config.model}' has "
                f"{self.depth} layers, 0 to {self.depth - 1}"
            )
        attention = self.vit.blocks[0].attn
        if not all(hasattr(attention, name) for name in ("q_norm", "k_norm", "scale", "num_heads")):
            raise UserError(
                f"--teacher.model '{config.model}': its attention ({type(attention).__name__}) "
                "cannot be tapped"
            )
        self.requires_grad_(False).eval()

    def info(self) -> TeacherInfo:
        """What the manifest says of this teacher."""
        return TeacherInfo(
            model=self.config.model,
            model_args=self.config.model_args,
            weights=self.config.weights,
            seed=self.config.seed,
            weights_sha256=self.weights_sha256,
            image_size=self.image_size,
            mean=self.mean,
            std=self.std,
            depth=self.depth,
            width=self.vit.embed_dim,
            heads=self.vit.blocks[0].attn.num_heads,
            grid=self.grid,
            layers=self.layers,
        )

    def preprocess(self, images_B3RR: Tensor) -> Tensor:
        """uint8 crops to the teacher's input (B, 3, S, S), float32.

        Normalise, then resize bicubically without antialiasing, as REPA and HASTE do.
        """
        images = images_B3RR.float().div_(255)
        mean = torch.tensor(self.mean, device=images.device).view(1, 3, 1, 1)
        std = torch.tensor(self.std, device=images.device).view(1, 3, 1, 1)
        images = (images - mean) / std
        if images.shape[-1] != self.image_size:
            size = (self.image_size, self.image_size)
            images = F.interpolate(images, size=size, mode="bicubic")
        return images

    def embed(self, pixels_B3SS: Tensor) -> Tensor:
        """Preprocessed pixels to the tokens (B, P + N, D) that enter block 0, P prefix tokens."""
        vit = self.vit
        tokens: Tensor = vit.norm_pre(vit.patch_drop(vit._pos_embed(vit.patch_embed(pixels_B3SS))))
        return tokens

    def run_blocks(
        self, tokens: Tensor, start: int = 0, stop: int | None = None
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Blocks ``start`` to ``stop - 1``: the tokens that leave them, and the attention logits
        (B, H, N, N) of the tapped layers among them."""
        logits: dict[int, Tensor] = {}
        for number in range(start, self.depth if stop is None else stop):
            block = self.vit.blocks[number]
            if number in self.layers:
                with _AttentionTap(block.attn, self.vit.num_prefix_tokens) as tap:
                    tokens = block(tokens)
                logits[number] = tap.logits()
            else:
                tokens = block(tokens)
        return tokens, logits

    def forward(self, images_B3RR: Tensor) -> TeacherTargets:
        """The whole teacher on uint8 crops (B, 3, R, R)."""
        tokens, logits = self.run_blocks(self.embed(self.preprocess(images_B3RR)))
        tokens = self.vit.norm(tokens).float()
        return TeacherTargets(
            features=tokens[:, self.vit.num_prefix_tokens :],
            class_token=tokens[:, 0],
            attention_logits=torch.stack([logits[layer] for layer in self.layers], dim=1),
        )


class _AttentionTap:
    """Catches q and k of one attention module where every timm variant has them: after q_norm and
    k_norm, which are identities in models without such norms."""

    def __init__(self, attention: nn.Module, num_prefix_tokens: int) -> None:
        self.attention: Any = attention
        self.num_prefix_tokens = num_prefix_tokens
        self.caught: dict[str, Tensor] = {}

    def __enter__(self) -> _AttentionTap:
        self.handles = [
            self.attention.q_norm.register_forward_hook(self._catch("q")),
            self.attention.k_norm.register_forward_hook(self._catch("k")),
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()

    def logits(self) -> Tensor:
        q, k = (self.caught[name][:, :, self.num_prefix_tokens :].float() for name in ("q", "k"))
        with torch.autocast(q.device.type, enabled=False):
            return (q * self.attention.scale) @ k.transpose(-2, -1)

    def _catch(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            self.caught[name] = output

        return hook


def _create(config: TeacherConfig, resolution: int) -> Any:
    """The timm model with its weights, position embedding at the wanted grid."""

    def create(**kwargs: Any) -> Any:
        try:
            return timm.create_model(config.model, num_classes=0, **config.model_args, **kwargs)
        except Exception as error:  # timm raises whatever its model's constructor raises
            reason = " ".join(str(error).split())
            raise UserError(f"--teacher.model '{config.model}': {reason}") from None

    with torch.device("meta"):
        draft = create()
    if not (hasattr(draft, "blocks") and hasattr(draft, "_pos_embed")):
        raise UserError(f"--teacher.model '{config.model}' is not a plain vision transformer")
    patch = int(draft.patch_embed.patch_size[0])
    size = config.image_size or resolution // PIXELS_PER_TOKEN * patch
    if size < patch or size % patch:
        raise UserError(
            f"--teacher.image-size {size} is not a multiple of the teacher's patch size {patch}"
        )
    if config.weights == "hub":
        return create(img_size=size, pretrained=True)
    vit = create(img_size=size)
    load_weights(vit, config)
    return vit
