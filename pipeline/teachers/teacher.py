"""A timm vision transformer with taps on its attention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.hashing import sha256_of_arrays
from pipeline.storage.files import redact
from pipeline.teachers.attention_tap import AttentionOperands, AttentionTap
from pipeline.teachers.token_network import TokenNetwork
from pipeline.teachers.vit import (
    block_arguments,
    create_tail,
    create_vit,
    embed,
    final_norm,
    normalisation,
)
from schemas.errors import UserError
from schemas.extract import TeacherConfig
from schemas.networks import TeacherInfo
from schemas.validation import validate


class TeacherTargets(NamedTuple):
    """Targets of one forward pass of the teacher (B images, N patches, L layers)."""

    features: Tensor
    """(B, N, D) patch tokens after the final norm."""
    class_token: Tensor
    """(B, D) class token after the final norm; the mean of ``features`` in models without one
    (SigLIP)."""
    attention_logits: Tensor
    """(B, L, H, N, N) q k^T / sqrt(d) before the softmax, float32, without rows and columns of
    class and register tokens (HASTE section 2.3)."""


class Teacher(nn.Module):
    """The frozen teacher: uint8 crops in, ``TeacherTargets`` out.

    ``forward`` is ``finish(*run_blocks(embed(preprocess(images))))``. ``run_blocks`` runs any range
    of blocks, so a forward pass can be cut into parts.
    """

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(
        self,
        config: TeacherConfig,
        *,
        resolution: int,
        layers: Sequence[int],
        first_block: int = 0,
        tail: Mapping[str, Tensor] | None = None,
    ) -> None:
        """With ``tail``, the weights of ``tail_state``, only the blocks from ``first_block`` on are
        created. Raises ``UserError`` for unusable options, ``ValueError`` if ``tail`` is of another
        model."""
        super().__init__()
        self.config = config
        self.layers = tuple(layers)
        self.first_block = first_block
        self.vit, (self.depth, self.heads, self.head_width) = (
            create_vit(config, resolution, tapped=bool(layers))
            if tail is None
            else create_tail(config, resolution, first_block, tail, tapped=bool(layers))
        )
        self.weights_sha256 = sha256_of_arrays(
            (name, tensor.numpy()) for name, tensor in sorted(self.vit.state_dict().items())
        )
        named = normalisation(self.vit)
        self.mean, self.std = config.mean or named[0], config.std or named[1]
        self.statistics_of = "model" if (self.mean, self.std) == named else "options"
        for name, values in (("pixel_mean", self.mean), ("pixel_std", self.std)):
            self.register_buffer(name, torch.tensor(values).view(1, 3, 1, 1), persistent=False)
        self.image_size = int(self.vit.patch_embed.img_size[0])
        self.grid: tuple[int, int] = tuple(self.vit.patch_embed.grid_size)
        self.prefix = int(self.vit.num_prefix_tokens)
        self.has_class_token = self.vit.cls_token is not None
        self._traced_tap = AttentionTap()
        if self.layers and max(self.layers) >= self.depth:
            raise UserError(
                f"--layers asks for layer {max(self.layers)}; teacher '{config.model}' has "
                f"{self.depth} layers, 0 to {self.depth - 1}"
            )
        self.requires_grad_(False).eval()

    def info(self) -> TeacherInfo:
        """Teacher entry of the manifest. Raises ``UserError`` if a value is outside its limits."""
        values = {
            "model": self.config.model,
            "model_args": self.config.model_args,
            "weights": redact(self.config.weights),
            "seed": self.config.seed,
            "weights_sha256": self.weights_sha256,
            "image_size": self.image_size,
            "mean": self.mean,
            "std": self.std,
            "statistics_of": self.statistics_of,
            "resize": self.config.resize,
            "depth": self.depth,
            "width": self.vit.embed_dim,
            "heads": self.heads,
            "head_width": self.head_width,
            "grid": self.grid,
            "prefix": self.prefix,
            "layers": self.layers,
        }
        return validate(TeacherInfo, values, where=f"teacher '{self.config.model}'")

    def preprocess(self, images_B3RR: Tensor) -> Tensor:
        """uint8 crops to the teacher's input (B, 3, S, S), float32.

        Normalises, then resizes, by default bicubically without antialiasing as REPA and HASTE do.
        """
        images = images_B3RR.float().div_(255)
        images = (images - self.pixel_mean) / self.pixel_std
        if images.shape[-1] != self.image_size:
            size = (self.image_size, self.image_size)
            mode, _, antialias = self.config.resize.partition("_")
            images = F.interpolate(images, size=size, mode=mode, antialias=bool(antialias))
        return images

    def embed(self, pixels_B3SS: Tensor) -> Tensor:
        """Preprocessed pixels to the tokens (B, P + N, D) that enter block 0; P prefix tokens."""
        return embed(self.vit, pixels_B3SS)

    def run_blocks(
        self, tokens: Tensor, start: int = 0, stop: int | None = None
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Run blocks ``start`` to ``stop - 1``: returns the output tokens and the attention logits
        (B, H, N, N) of the tapped layers in this range."""
        tokens, operands = self.tap_blocks(tokens, start, stop)
        return tokens, {layer: one.logits(self.prefix) for layer, one in operands.items()}

    def tap_blocks(
        self, tokens: Tensor, start: int = 0, stop: int | None = None
    ) -> tuple[Tensor, dict[int, AttentionOperands]]:
        """As ``run_blocks``, with the attention operands of the tapped layers."""
        operands: dict[int, AttentionOperands] = {}
        if isinstance(self.vit, TokenNetwork):
            return tokens, operands
        arguments = block_arguments(self.vit)
        for number in range(start, self.depth if stop is None else stop):
            index = number - self.first_block
            if number in self.layers:
                # torch.compile traces a mode that exists, but not its constructor; elsewhere
                # several threads may run the same teacher
                tap = self._traced_tap if torch.compiler.is_compiling() else AttentionTap()
                with tap:
                    tokens = self.vit.blocks[index](tokens, **arguments[index])
                operands[number] = tap.calls.pop()
            else:
                tokens = self.vit.blocks[index](tokens, **arguments[index])
        return tokens, operands

    def finish(self, tokens: Tensor, logits: Mapping[int, Tensor]) -> TeacherTargets:
        """Targets from the output tokens (B, P + N, D) of the last block and the logits of every
        tapped layer."""
        features, class_token = self.normed(tokens)
        B, N, _ = features.shape
        stacked = [logits[layer] for layer in self.layers]
        return TeacherTargets(
            features=features,
            class_token=class_token,
            attention_logits=torch.stack(stacked, dim=1)
            if stacked
            else tokens.new_empty(B, 0, self.heads, N, N),
        )

    def normed(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Features and class token of ``TeacherTargets`` from the output tokens of the last
        block."""
        tokens = final_norm(self.vit)(tokens).float()
        features = tokens[:, self.prefix :]
        return features, tokens[:, 0] if self.has_class_token else features.mean(1)

    def forward(self, images_B3RR: Tensor) -> TeacherTargets:
        """Targets of uint8 crops (B, 3, R, R)."""
        return self.finish(*self.run_blocks(self.embed(self.preprocess(images_B3RR))))
