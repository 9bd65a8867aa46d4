"""Images to latents and back, through diffusers."""

from pipeline.autoencoders.autoencoder import Autoencoder
from pipeline.autoencoders.decoder import decode_means, decode_scaled, open_decoder

__all__ = ["Autoencoder", "decode_means", "decode_scaled", "open_decoder"]
