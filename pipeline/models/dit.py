"""DiT, the diffusion transformer (arXiv 2212.09748), with taps: the network that SiT took over."""

from __future__ import annotations

from pipeline.models.sit import SiT


class DiT(SiT):
    """Predicts the noise in a latent, then the variance of the step back: (B, 2 C, h, w).

    Its time is the integer timestep, 0 to 999. Parameter names are those of the DiT repository.
    """

    parts = 2
