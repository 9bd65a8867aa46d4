"""A diffusers AutoencoderKL or AutoencoderTiny behind one small interface."""

from __future__ import annotations

from typing import Any, Literal

import diffusers
import torch
from torch import Tensor, nn

from pipeline.assets import DEMO_AUTOENCODER
from pipeline.hashing import sha256_of_arrays
from schemas.errors import UserError
from schemas.store import AutoencoderInfo

KINDS = ("AutoencoderKL", "AutoencoderTiny")


class Autoencoder(nn.Module):
    """uint8 images to the mean and std of their latents, and scaled latents to uint8 images."""

    def __init__(self, name: str, *, option: str = "--autoencoder") -> None:
        super().__init__()
        self.name = name
        self.model, self.kind = _load(name, option)
        self.weights_sha256 = sha256_of_arrays(
            (key, tensor.numpy()) for key, tensor in sorted(self.model.state_dict().items())
        )
        self.scaling_factor = float(self.model.config.scaling_factor)
        self.shift_factor = float(getattr(self.model.config, "shift_factor", None) or 0.0)
        # the order that convolutions would else put their numbers into, and back, each time
        self.model.to(memory_format=torch.channels_last)
        self.requires_grad_(False).eval()

    def info(self, resolution: int) -> AutoencoderInfo:
        """What the manifest says of this autoencoder at ``resolution`` pixels."""
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
        """uint8 images to mean and std of the posterior, each (B, C, h, w) in float32, unscaled.

        The std of a deterministic autoencoder is 0. On GPUs torch's convolutions of float32 numbers
        are in TF32 unless ``torch.backends.cudnn.allow_tf32`` says otherwise.
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
        """Scaled latents, as the student sees them, to uint8 images (B, 3, R, R).

        Truncated, not rounded, to integers, as the FID numbers of SiT, REPA and HASTE were.
        """
        latents = latents_BChw.to(self.model.dtype) / self.scaling_factor + self.shift_factor
        pixels = self.model.decode(latents).sample.float()
        return ((pixels + 1) * 127.5).clamp_(0, 255).to(torch.uint8)


def _load(name: str, option: str) -> tuple[Any, Literal["AutoencoderKL", "AutoencoderTiny"]]:
    place = str(DEMO_AUTOENCODER) if name == "demo" else name
    try:
        kind = diffusers.AutoencoderKL.load_config(place).get("_class_name")
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{option} '{name}': is no folder with a diffusers config.json and no hub "
            f"model that can be reached ({reason})"
        ) from None
    if kind not in KINDS:
        raise UserError(f"{option} '{name}' is a {kind}; expected {' or '.join(KINDS)}")
    try:
        return getattr(diffusers, kind).from_pretrained(
            place, use_safetensors=True, low_cpu_mem_usage=False
        ), kind
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{option} '{name}': cannot load its weights ({reason})") from None
