"""The decoder of latents that an autoencoder made earlier, perhaps elsewhere."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.autoencoders.autoencoder import Autoencoder
from schemas.errors import UserError
from schemas.store import AutoencoderInfo

PUBLISHED_AUTOENCODER = "stabilityai/sd-vae-ft-ema"
"""What the authors of SiT, REPA and HASTE decode with."""


def open_decoder(
    named: str | None, encoder: AutoencoderInfo | None, *, option: str | None = "--autoencoder"
) -> Autoencoder:
    """The autoencoder ``named``, which may be any; else the one that encoded, as a manifest or a
    checkpoint says; else ``PUBLISHED_AUTOENCODER``. ``option`` names one, where there is such.

    Raises ``UserError`` where it cannot be loaded, or where what is found now by the encoder's name
    is another network: it would draw plausible and wrong pictures.
    """
    shown = option or "autoencoder"
    if named is not None or encoder is None:
        return Autoencoder(named or PUBLISHED_AUTOENCODER, option=shown)
    found = Autoencoder(encoder.name, option=shown)
    # where the latents were taken over from somebody else's files, nobody knows the weights
    if encoder.weights_sha256 not in (None, found.weights_sha256):
        raise _other(encoder, option, "SHA-256", found.weights_sha256, encoder.weights_sha256)
    factors = (found.scaling_factor, found.shift_factor)
    if factors != (encoder.scaling_factor, encoder.shift_factor):
        expected = (encoder.scaling_factor, encoder.shift_factor)
        raise _other(encoder, option, "(scaling, shift) factor", factors, expected)
    return found


def decode_means(decoder: Autoencoder, encoder: AutoencoderInfo, mean_BChw: Tensor) -> Tensor:
    """uint8 (B, 3, R, R) of the posterior's means as a store holds them, on the decoder's device.

    They are scaled by the encoder's factors, as a student sees them; the decoder undoes its own.
    Raises ``UserError`` where it is for other latents.
    """
    mean = mean_BChw.to(next(decoder.parameters()).device, torch.float32)
    return decode_scaled(decoder, (mean - encoder.shift_factor) * encoder.scaling_factor)


def decode_scaled(decoder: Autoencoder, latents_BChw: Tensor) -> Tensor:
    """``decoder.decode``, which raises ``UserError`` where it is for other latents."""
    try:
        return decoder.decode(latents_BChw)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"autoencoder '{decoder.name}' cannot decode latents of shape "
            f"{tuple(latents_BChw.shape[1:])}: {reason}"
        ) from None


def _other(
    encoder: AutoencoderInfo, option: str | None, what: str, found: object, expected: object
) -> UserError:
    hint = f", or name a decoder with {option}" if option else ""
    return UserError(
        f"autoencoder '{encoder.name}' is not the one that made the latents: its {what} is "
        f"{_short(found)}, not {_short(expected)}; bring that one back{hint}"
    )


def _short(value: object) -> str:
    return f"{value[:12]}..." if isinstance(value, str) else str(value)
