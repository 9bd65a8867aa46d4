"""Images to latents and back, through diffusers."""

from pipeline.autoencoders.autoencoder import Autoencoder

__all__ = ["Autoencoder"]
