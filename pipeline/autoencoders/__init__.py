"""Encoding of images to latents and decoding of latents, with diffusers' autoencoders."""

from pipeline.autoencoders.autoencoder import Autoencoder
from pipeline.autoencoders.decoder import decode_means, decode_scaled, open_decoder

__all__ = ["Autoencoder", "decode_means", "decode_scaled", "open_decoder"]
