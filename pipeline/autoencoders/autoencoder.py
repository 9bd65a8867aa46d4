"""One interface to diffusers' autoencoders of images."""

from __future__ import annotations

import contextlib
import inspect
import logging
import os
from collections.abc import Iterator, Mapping
from typing import Any, get_args

import diffusers
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.assets import DEMO_AUTOENCODER
from pipeline.diffusion.normalisation import (
    Normalisation,
    denormalise,
    read_normalisation,
)
from pipeline.hashing import sha256_of_module
from pipeline.precision import check_finite
from pipeline.storage.hub import HubUnreachableError, hub_access, is_hub_id
from schemas.errors import UserError, plain_text
from schemas.networks import AutoencoderInfo, AutoencoderKind

KINDS: tuple[AutoencoderKind, ...] = get_args(AutoencoderKind)
FRAMES = frozenset({"AutoencoderKLQwenImage", "AutoencoderKLWan"})
"""Classes that take an image as a film of one frame."""
PATCHED = frozenset({"AutoencoderKLFlux2"})
"""Classes whose latents are normalised, by the statistics of a batch norm, after 2 x 2 of them were
moved into channels."""
LACKS = {
    "ConsistencyDecoderVAE": "its decoder draws noise, so that a latent has no certain image",
    "AutoencoderRAE": "its latents have no spread, and it normalises them and pixels by itself",
    "AutoencoderKLKVAE": "its config has no scale of latents",
    "AutoencoderKLTemporalDecoder": "its decoder needs a number of frames",
}
"""Classes of images that are not supported, and why."""
OWN_ATTRIBUTES = {
    "AutoencoderTiny": {"block_out_channels"},
    "AsymmetricAutoencoderKL": {"block_out_channels", "force_upcast"},
}
"""Attributes that the constructor of a class writes into its config and does not read again."""
WEIGHTS_FILES = ("diffusion_pytorch_model.safetensors",)


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
        self.normalisation = _normalisation(self.model, self.kind, f"{option} '{name}'")
        if self.kind not in FRAMES:
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
            **self.normalisation._asdict(),
            latent_shape=(mean.shape[1], mean.shape[2], mean.shape[3]),
        )

    @torch.no_grad()
    def encode(self, images_B3RR: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and std of the posterior of uint8 images, each (B, C, h, w) float32, unscaled.

        The std of a deterministic autoencoder is 0. On GPUs torch computes float32 convolutions in
        TF32 unless ``torch.backends.cudnn.allow_tf32`` is off.
        """
        pixels = images_B3RR.to(self.model.dtype) / 127.5 - 1
        encoded = self.model.encode(pixels.unsqueeze(2) if self.kind in FRAMES else pixels)
        if "latent_dist" in encoded:
            moments = (encoded.latent_dist.mean, encoded.latent_dist.std)
        else:
            (latents,) = encoded.to_tuple()
            moments = (latents, torch.zeros_like(latents))
        mean, std = (self._flat(moment.float()) for moment in moments)
        return mean, std

    def _flat(self, latents: Tensor) -> Tensor:
        """Latents of images, (B, C, h, w), as the model has them."""
        if self.kind in FRAMES:
            return latents.squeeze(2)
        return F.pixel_unshuffle(latents, 2) if self.kind in PATCHED else latents

    def _as_model_has_them(self, latents_BChw: Tensor) -> Tensor:
        """The inverse of ``_flat``."""
        if self.kind in FRAMES:
            return latents_BChw.unsqueeze(2)
        return F.pixel_shuffle(latents_BChw, 2) if self.kind in PATCHED else latents_BChw

    @torch.no_grad()
    def decode(self, latents_BChw: Tensor) -> Tensor:
        """uint8 images (B, 3, R, R) of scaled latents, which are the input of students.

        Pixels are truncated to integers, not rounded, as for the published FIDs of SiT, REPA and
        HASTE.
        """
        latents = denormalise(latents_BChw.to(self.model.dtype), self.normalisation)
        pixels = self.model.decode(self._as_model_has_them(latents)).sample.float()
        if self.kind in FRAMES:
            pixels = pixels.squeeze(2)
        return ((pixels + 1) * 127.5).clamp_(0, 255).to(torch.uint8)


def _load(name: str, option: str) -> tuple[Any, AutoencoderKind]:
    path = str(DEMO_AUTOENCODER) if name == "demo" else name
    if os.path.isdir(path) or not is_hub_id(path):
        return _load_from(path, name, option)
    try:
        with hub_access(path, WEIGHTS_FILES):
            return _load_from(path, name, option)
    except HubUnreachableError as error:
        raise UserError(
            f"{option} '{name}' is neither a folder with a diffusers config.json nor an available "
            f"hub model: it {error}; give a folder, or a cache folder that has it (HF_HUB_CACHE)"
        ) from None


def _load_from(path: str, name: str, option: str) -> tuple[Any, AutoencoderKind]:
    try:
        config = diffusers.AutoencoderKL.load_config(path)
    except (OSError, ValueError) as error:
        reason = plain_text(str(error))[:200]
        raise UserError(
            f"{option} '{name}' is neither a folder with a diffusers config.json nor an available "
            f"hub model ({reason})"
        ) from None
    kind = config.get("_class_name")
    if kind not in KINDS:
        reason = LACKS.get(kind, "it is not one of images, or not known")
        raise UserError(
            f"{option} '{name}' is a {kind}, which is not supported: {reason}; expected "
            f"{', '.join(KINDS[:-1])} or {KINDS[-1]}"
        )
    network = getattr(diffusers, kind)
    own = OWN_ATTRIBUTES.get(kind, set())
    ignored = {key for key in config if not key.startswith("_")} - own
    ignored -= inspect.signature(network.__init__).parameters.keys()
    for key in sorted(ignored):
        numbers = any(word in key for word in ("mean", "std", "shift", "scal"))
        if numbers and config[key] is not None:
            raise UserError(
                f"{option} '{name}': its config.json has {key}, which this version's {kind} "
                "does not use; it may be a normalisation of its latents"
            )
    try:
        with _quiet(own if not ignored else set()):
            return network.from_pretrained(
                path, use_safetensors=True, low_cpu_mem_usage=False
            ), kind
    except (OSError, ValueError, RuntimeError) as error:
        reason = plain_text(str(error))[:200]
        raise UserError(f"{option} '{name}': its weights cannot be loaded ({reason})") from None


def _normalisation(model: Any, kind: str, where: str) -> Normalisation:
    """That of a model's latents as ``encode`` gives them. Raises ``UserError``."""
    config: Mapping[str, Any] = model.config
    if kind in PATCHED:
        # computed in float32, as in the library's pipelines
        std = torch.sqrt(model.bn.running_var + config["batch_norm_eps"])
        config = {"latents_mean": model.bn.running_mean.tolist(), "latents_std": std.tolist()}
        return read_normalisation(config, len(std), where)
    channels = config["z_dim"] if kind in FRAMES else config["latent_channels"]
    return read_normalisation(config, channels, where)


@contextlib.contextmanager
def _quiet(attributes: set[str]) -> Iterator[None]:
    """Suppress the library's warning that it ignores exactly these attributes of a config."""

    def shows(record: logging.LogRecord) -> bool:
        text = record.getMessage()
        known = bool(attributes) and all(f"'{key}'" in text for key in attributes)
        return not (known and "will be ignored" in text)

    logger = logging.getLogger("diffusers.configuration_utils")
    logger.addFilter(shows)
    try:
        yield
    finally:
        logger.removeFilter(shows)
