"""Sources of latents: an autoencoder, or latent files of the data set."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from typing import Protocol

import diffusers
import numpy as np
import torch
from torch import Tensor

from pipeline.assets import DEMO_AUTOENCODER
from pipeline.autoencoders import Autoencoder
from pipeline.datasets import ImageItem, open_reader
from pipeline.datasets.crop import BadImageError
from pipeline.datasets.reader import UNREADABLE
from pipeline.datasets.repa import first_latents
from pipeline.datasets.stored_latents import MAX_BYTES, parse_moments
from pipeline.diffusion.normalisation import Normalisation, read_normalisation
from pipeline.storage.files import redact
from pipeline.storage.npz import MAX_HEADER
from schemas.errors import UserError
from schemas.extract import ExtractConfig
from schemas.networks import AutoencoderInfo

SD_SCALING = 0.18215
FIRST_LATENTS = 64
"""Latents of ``coco256_features`` that are tried for a shape."""
SD_AUTOENCODERS = ("stabilityai/sd-vae-ft-mse", "stabilityai/sd-vae-ft-ema")


class LatentSource(Protocol):
    """Provides the latents of a batch of images."""

    def info(self, resolution: int) -> AutoencoderInfo:
        """Autoencoder entry of the manifest. Raises ``UserError``."""

    def read(self, item: ImageItem) -> np.ndarray:
        """Stored latent of one image, empty if the source computes latents; called in the decoding
        threads. Raises ``BadImageError``."""

    def latents(self, stored: Sequence[np.ndarray], pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and std, float32 (B, C, h, w), from the results of ``read`` and uint8 pixels
        (B, 3, R, R)."""


def open_latents(config: ExtractConfig, device: torch.device) -> LatentSource:
    """The latent source of ``config.dataset``. Raises ``UserError``."""
    if config.dataset in ("repa", "coco256_features"):
        return StoredLatents(config)
    return AutoencoderLatents(config, device)


class AutoencoderLatents:
    """Encodes pixels with an autoencoder."""

    def __init__(self, config: ExtractConfig, device: torch.device) -> None:
        self.autoencoder = Autoencoder(config.autoencoder).to(device)

    def info(self, resolution: int) -> AutoencoderInfo:
        """Runs a first forward pass, so that an unusable autoencoder is reported early."""
        return self.autoencoder.info(resolution)

    def read(self, item: ImageItem) -> np.ndarray:
        return np.empty(0, np.float32)

    def latents(self, stored: Sequence[np.ndarray], pixels: Tensor) -> tuple[Tensor, Tensor]:
        return self.autoencoder.encode(
            pixels
        )  # in float32, because its rounding error is in every run


class StoredLatents:
    """Reads the latents of `--dataset repa` or `coco256_features`; ``config.autoencoder`` names
    their autoencoder, which is not loaded."""

    def __init__(self, config: ExtractConfig) -> None:
        self.name = config.autoencoder
        self._coco = (config.split or "train") if config.dataset == "coco256_features" else None
        self._read_file = open_reader(config)
        self._limit = MAX_BYTES
        self.shape = self._first_shape(config.source or "")
        self._limit = MAX_HEADER + 4 * int(np.prod(self.shape))
        self.normalisation = _normalisation(self.name, self.shape[0] // 2)

    def info(self, resolution: int) -> AutoencoderInfo:
        return AutoencoderInfo(
            name=self.name,
            kind="AutoencoderKL",
            weights_sha256=None,
            **self.normalisation._asdict(),
            latent_shape=(self.shape[0] // 2, self.shape[1], self.shape[2]),
        )

    def read(self, item: ImageItem) -> np.ndarray:
        """float32 (2C, h, w), the same shape for all images. Raises ``BadImageError``."""
        moments = self._parse(item)
        if moments.shape != self.shape:
            raise BadImageError(
                f"{item.latent}: has shape {moments.shape}; the first latent has {self.shape}"
            )
        return moments

    def latents(self, stored: Sequence[np.ndarray], pixels: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = torch.from_numpy(np.stack(stored)).chunk(2, dim=1)
        return mean, std

    def _first_shape(self, source: str) -> tuple[int, ...]:
        """Shape of the first readable latent; damaged ones are reported later, as bad images.
        Raises ``UserError`` if there is none."""
        shown = redact(source)
        problem = f"--source '{shown}': vae-sd/dataset.json lists no latents at its beginning"
        numbered = (
            ImageItem(str(n), 0, "", latent=f"{self._coco}/{n}.npy") for n in range(FIRST_LATENTS)
        )
        for item in numbered if self._coco else first_latents(source):
            try:
                return self._parse(item).shape
            except BadImageError as error:
                problem = f"--source '{shown}': none of its first latents can be read: {error}"
        raise UserError(problem)

    def _parse(self, item: ImageItem) -> np.ndarray:
        assert item.latent is not None
        try:
            part = item._replace(path=item.latent, offset=0, length=self._limit + 1)
            data = self._read_file(part)
            if len(data) > self._limit:
                raise BadImageError(f"is larger than {self._limit} bytes")
            return parse_moments(data, log_variance=self._coco is not None)
        except UNREADABLE as error:
            reason = error.strerror or type(error).__name__
            raise BadImageError(f"{item.latent}: {reason}") from None
        except BadImageError as error:
            raise BadImageError(f"{item.latent}: {error}") from None
        except OSError as error:
            if error.errno != errno.EINVAL:  # s3fs raises it for a range of an empty object
                raise
            raise BadImageError(f"{item.latent}: is empty") from None


def _normalisation(name: str, channels: int) -> Normalisation:
    """Normalisation of an autoencoder's latents, from a config on this machine: nothing is
    downloaded, because the extraction does not need the weights. Raises ``UserError``."""
    if name in SD_AUTOENCODERS:
        return Normalisation(SD_SCALING)
    folder = str(DEMO_AUTOENCODER) if name == "demo" else name
    try:
        config = diffusers.AutoencoderKL.load_config(folder, local_files_only=True)
    except (OSError, ValueError):
        raise UserError(
            f"--autoencoder '{name}': is not a folder with a diffusers config.json, which has "
            "the scaling factor of the latents in --source; name the autoencoder that made them"
        ) from None
    if config.get("_class_name") != "AutoencoderKL":
        raise UserError(
            f"--autoencoder '{name}' is of class {config.get('_class_name')}; latents with mean "
            "and std, as in --source, come from an AutoencoderKL"
        )
    config = {"scaling_factor": SD_SCALING, **config}
    return read_normalisation(config, channels, f"--autoencoder '{name}'")
