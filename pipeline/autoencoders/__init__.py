"""Images to latents and back, through diffusers."""

from pipeline.autoencoders.autoencoder import Autoencoder
from pipeline.autoencoders.decoder import decode_means, open_decoder

__all__ = ["Autoencoder", "decode_means", "open_decoder"]
