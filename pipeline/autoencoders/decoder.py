"""Decoder for the latents of a store or checkpoint."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.autoencoders.autoencoder import Autoencoder
from pipeline.diffusion.normalisation import normalisation_of, normalise
from pipeline.text import short_value
from schemas.errors import UserError, plain_text
from schemas.networks import AutoencoderInfo

PUBLISHED_AUTOENCODER = "stabilityai/sd-vae-ft-ema"
"""Decoder of the authors of SiT, REPA and HASTE."""


def open_decoder(
    name: str | None, encoder: AutoencoderInfo | None, *, option: str | None = "--autoencoder"
) -> Autoencoder:
    """The autoencoder ``name``, by default the encoder that a manifest or checkpoint names, else
    ``PUBLISHED_AUTOENCODER``. ``option`` is the command-line option for ``name``, None without one.

    Raises ``UserError`` where it cannot be loaded, or where the encoder's name now refers to other
    weights, because images decoded with them look plausible and are wrong.
    """
    shown_option = option or "autoencoder"
    if name is not None or encoder is None:
        return Autoencoder(name or PUBLISHED_AUTOENCODER, option=shown_option)
    decoder = Autoencoder(encoder.name, option=shown_option)
    # the weights are unknown where a data set came with its latents
    if encoder.weights_sha256 not in (None, decoder.weights_sha256):
        raise _mismatch(encoder, option, "SHA-256", decoder.weights_sha256, encoder.weights_sha256)
    expected = normalisation_of(encoder)
    for key, found in decoder.normalisation._asdict().items():
        if found != getattr(expected, key):
            raise _mismatch(encoder, option, key, found, getattr(expected, key))
    return decoder


def decode_means(decoder: Autoencoder, encoder: AutoencoderInfo, mean_BChw: Tensor) -> Tensor:
    """uint8 (B, 3, R, R) on the decoder's device, for the posterior means of a store.

    The means are normalised by the encoder's numbers, as for a student, and the decoder undoes its
    own.
    Raises ``UserError`` where the decoder does not accept latents of this shape.
    """
    mean = mean_BChw.to(next(decoder.parameters()).device, torch.float32)
    return decode_scaled(decoder, normalise(mean, normalisation_of(encoder)))


def decode_scaled(decoder: Autoencoder, latents_BChw: Tensor) -> Tensor:
    """``decoder.decode`` that raises ``UserError`` where the decoder does not accept latents of
    this shape."""
    try:
        return decoder.decode(latents_BChw)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        reason = plain_text(str(error))[:200]
        raise UserError(
            f"autoencoder '{decoder.name}' cannot decode latents of shape "
            f"{tuple(latents_BChw.shape[1:])}: {reason}"
        ) from None


def _mismatch(
    encoder: AutoencoderInfo, option: str | None, key: str, found: object, expected: object
) -> UserError:
    hint = f", or name a decoder with {option}" if option else ""
    return UserError(
        f"autoencoder '{encoder.name}' is not the one that encoded the latents: its {key} is "
        f"{short_value(found, 40)}, not {short_value(expected, 40)}; restore the original{hint}"
    )
