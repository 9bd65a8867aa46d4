"""One interface to diffusers' AutoencoderKL and AutoencoderTiny."""

from __future__ import annotations

from typing import Any, Literal

import diffusers
import torch
from torch import Tensor, nn

from pipeline.assets import DEMO_AUTOENCODER
from pipeline.hashing import sha256_of_module
from pipeline.precision import check_finite
from schemas.errors import UserError, plain_text
from schemas.store import AutoencoderInfo

KINDS = ("AutoencoderKL", "AutoencoderTiny")


class Autoencoder(nn.Module):
    """Encodes uint8 images to mean and std of their latents; decodes scaled latents to uint8
    images."""

    def __init__(self, name: str, *, option: str = "--autoencoder") -> None:
        """``name`` is a folder, a hub id or 'demo'. Raises ``UserError`` naming ``option``."""
        super().__init__()
        self.name = name
        self.model, self.kind = _load(name, option)
        check_finite(self.model.state_dict(), f"{option} '{name}'")
        self.weights_sha256 = sha256_of_module(self.model)
        self.scaling_factor = float(self.model.config.scaling_factor)
        self.shift_factor = float(getattr(self.model.config, "shift_factor", None) or 0.0)
        # otherwise each convolution converts to this memory format and back
        self.model.to(memory_format=torch.channels_last)
        self.requires_grad_(False).eval()

    def info(self, resolution: int) -> AutoencoderInfo:
        """Entry of a manifest for images of ``resolution`` pixels. Raises ``UserError`` where the
        autoencoder cannot encode them."""
        device = next(self.parameters()).device
        blank = torch.zeros(1, 3, resolution, resolution, dtype=torch.uint8, device=device)
        try:
            mean, _ = self.encode(blank)
        except RuntimeError as error:
            raise UserError(
                f"--autoencoder '{self.name}' cannot encode {resolution} px images: {error}"
            ) from None
        return AutoencoderInfo(
            name=self.name,
            kind=self.kind,
            weights_sha256=self.weights_sha256,
            scaling_factor=self.scaling_factor,
            shift_factor=self.shift_factor,
            latent_shape=(mean.shape[1], mean.shape[2], mean.shape[3]),
        )

    @torch.no_grad()
    def encode(self, images_B3RR: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and std of the posterior of uint8 images, each (B, C, h, w) float32, unscaled.

        The std of a deterministic autoencoder is 0. On GPUs torch computes float32 convolutions in
        TF32 unless ``torch.backends.cudnn.allow_tf32`` is off.
        """
        pixels = images_B3RR.to(self.model.dtype) / 127.5 - 1
        encoded = self.model.encode(pixels)
        if self.kind == "AutoencoderTiny":
            mean = encoded.latents.float()
            return mean, torch.zeros_like(mean)
        posterior = encoded.latent_dist
        return posterior.mean.float(), posterior.std.float()

    @torch.no_grad()
    def decode(self, latents_BChw: Tensor) -> Tensor:
        """uint8 images (B, 3, R, R) of scaled latents, which are the input of students.

        Pixels are truncated to integers, not rounded, as for the published FIDs of SiT, REPA and
        HASTE.
        """
        latents = latents_BChw.to(self.model.dtype) / self.scaling_factor + self.shift_factor
        pixels = self.model.decode(latents).sample.float()
        return ((pixels + 1) * 127.5).clamp_(0, 255).to(torch.uint8)


def _load(name: str, option: str) -> tuple[Any, Literal["AutoencoderKL", "AutoencoderTiny"]]:
    path = str(DEMO_AUTOENCODER) if name == "demo" else name
    try:
        kind = diffusers.AutoencoderKL.load_config(path).get("_class_name")
    except (OSError, ValueError) as error:
        reason = plain_text(str(error))[:200]
        raise UserError(
            f"{option} '{name}' is neither a folder with a diffusers config.json nor an available "
            f"hub model ({reason})"
        ) from None
    if kind not in KINDS:
        raise UserError(f"{option} '{name}' is a {kind}; expected {' or '.join(KINDS)}")
    try:
        return getattr(diffusers, kind).from_pretrained(
            path, use_safetensors=True, low_cpu_mem_usage=False
        ), kind
    except (OSError, ValueError, RuntimeError) as error:
        reason = plain_text(str(error))[:200]
        raise UserError(f"{option} '{name}': its weights cannot be loaded ({reason})") from None
