"""Options of the class-conditional diffusion transformer."""

from __future__ import annotations

from typing import Annotated, Literal, NamedTuple

from pydantic import Field, model_validator

from schemas.base import Strict

SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}
"""Depth, width and heads of the published sizes (arXiv 2401.08740, table 1)."""

Positive = Annotated[int, Field(ge=1)]
ModelName = Annotated[str, Field(pattern=r"^(SiT|DiT)-(S|B|L|XL)/(1|2|4|8)$")]


class StudentSize(NamedTuple):
    depth: int
    width: int
    heads: int
    patch_size: int

    def check(self, latent_size: int) -> None:
        """Raises ``ValueError`` for sizes that do not divide each other."""
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of {self.heads} heads")
        if self.width % 4:
            raise ValueError(f"width {self.width} is not a multiple of 4")
        if latent_size % self.patch_size:
            raise ValueError(
                f"latent_size {latent_size} is not a multiple of patch {self.patch_size}"
            )


class StudentConfig(Strict):
    """The student network."""

    model: ModelName = "SiT-XL/2"
    """Family, published size and patch: SiT or DiT, -S, -B, -L or -XL, then /1, /2, /4 or /8."""
    latent_size: Positive = 32
    """Rows and columns of the latent: 32 for 256 px images, 64 for 512 px."""
    latent_channels: Positive = 4
    """Channels of the latent."""
    num_classes: Positive = 1000
    """Classes of the data set. Default: the number of the store; 1000 where there is none
    (--plan)."""
    depth: Positive | None = None
    """Blocks. Default: those of the published size."""
    width: Positive | None = None
    """Width. Default: that of the published size."""
    heads: Positive | None = None
    """Attention heads. Default: those of the published size."""
    class_token: Positive | None = Field(default=None, exclude_if=lambda width: width is None)
    """SiT: width of the teacher's class token, which is denoised together with the latent (REG,
    arXiv 2507.01467); 768 for DINOv2-B. Default: no class token."""

    @property
    def family(self) -> Literal["SiT", "DiT"]:
        """SiT predicts velocities, DiT noise and variance."""
        return "DiT" if self.model.startswith("DiT-") else "SiT"

    @property
    def size(self) -> StudentSize:
        """The sizes in use."""
        name, patch = self.model.removeprefix(f"{self.family}-").split("/")
        depth, width, heads = SIZES[name]
        return StudentSize(
            self.depth or depth, self.width or width, self.heads or heads, int(patch)
        )

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens."""
        rows = self.latent_size // self.size.patch_size
        return (rows, rows)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        return (self.latent_channels, self.latent_size, self.latent_size)

    @model_validator(mode="after")
    def _sizes_fit(self) -> StudentConfig:
        self.size.check(self.latent_size)
        if self.class_token is not None and self.family != "SiT":
            raise ValueError(f"{self.model} cannot denoise a class token: class_token is for SiT")
        return self
