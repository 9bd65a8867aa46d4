"""Images to latents and back, through diffusers."""

from pipeline.autoencoders.autoencoder import Autoencoder
from pipeline.autoencoders.decoder import decode_means, decoder_is, open_decoder

__all__ = ["Autoencoder", "decode_means", "decoder_is", "open_decoder"]
