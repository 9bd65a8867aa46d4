"""DiT, the diffusion transformer (arXiv 2212.09748), with taps. SiT uses the same network."""

from __future__ import annotations

from pipeline.models.sit import SiT


class DiT(SiT):
    """Predicts the noise and the variance of the reverse step: (B, 2 C, h, w).

    The time is an integer timestep, 0 to 999. Parameter names are those of the DiT repository.
    """

    parts = 2
