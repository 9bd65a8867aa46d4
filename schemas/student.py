"""Options of the diffusion transformer: conditioned on classes, or on captions."""

from __future__ import annotations

from typing import Annotated, Any, Literal, NamedTuple

from pydantic import AfterValidator, Field, model_validator

from schemas.base import Strict
from schemas.fields import is_none

SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}
"""Depth, width and heads of the published sizes (arXiv 2401.08740, table 1)."""

Positive = Annotated[int, Field(ge=1)]
ModelName = Annotated[str, Field(pattern=r"^(SiT|DiT)-(S|B|L|XL)/(1|2|4|8)$")]
"""A class-conditional student."""


def _with_patch(name: str) -> str:
    """MMDiT-24 is MMDiT-24/2."""
    return name if "/" in name else f"{name}/2"


StudentName = Annotated[
    str,
    Field(pattern=r"^((SiT|DiT)-(S|B|L|XL)/(1|2|4|8)|MMDiT-[1-9][0-9]?(/(1|2|4|8))?)$"),
    AfterValidator(_with_patch),
]
HEAD_WIDTH = 32
"""Width of a head of MMDiT-N, which has N blocks and heads, as in REPA and HASTE."""
TEXT_SHAPE = (77, 768)
"""Tokens of a caption and their width, of CLIP ViT-L/14."""


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

    model: StudentName = "SiT-XL/2"
    """Family, published size and patch: SiT or DiT, -S, -B, -L or -XL, then /1, /2, /4 or /8. For
    captions MMDiT-24, or -1 to -99: blocks and heads, of 32 numbers each (patch: /2)."""
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
    class_token: Positive | None = Field(default=None, exclude_if=is_none)
    """SiT: width of the teacher's class token, which is denoised together with the latent (REG,
    arXiv 2507.01467); 768 for DINOv2-B. Default: no class token."""
    text_width: Positive | None = Field(default=None, exclude_if=is_none)
    """MMDiT: width of the text embeddings. Default: that of the store; 768 (CLIP ViT-L/14) where
    there is none (--plan)."""
    text_tokens: Positive | None = Field(default=None, exclude_if=is_none)
    """MMDiT: tokens of a caption, padding included. Default: those of the store; 77 where there is
    none (--plan)."""
    initialisation: Literal["pytorch", "zero"] | None = Field(default=None, exclude_if=is_none)
    """MMDiT: 'pytorch', that of each layer's class, as in REPA and HASTE (default); 'zero', that of
    DiT and SiT, where each block starts as the identity and the output as 0."""

    @property
    def family(self) -> Literal["SiT", "DiT", "MMDiT"]:
        """SiT and MMDiT predict velocities, DiT noise and variance; MMDiT reads captions."""
        return self.model.split("-")[0]  # type: ignore[return-value]

    @property
    def text_shape(self) -> tuple[int, int]:
        """MMDiT: tokens of a caption and their width."""
        return (self.text_tokens or TEXT_SHAPE[0], self.text_width or TEXT_SHAPE[1])

    @property
    def size(self) -> StudentSize:
        """The sizes in use."""
        name, patch = self.model.removeprefix(f"{self.family}-").split("/")
        if self.family == "MMDiT":
            depth, width, heads = int(name), HEAD_WIDTH * int(name), int(name)
        else:
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

    @model_validator(mode="before")
    @classmethod
    def _says_its_initialisation(cls, values: Any) -> Any:
        """Initialise as the authors do, and say so in the run's config."""
        if isinstance(values, dict) and str(values.get("model", "")).startswith("MMDiT-"):
            given = values.get("initialisation")
            return {**values, "initialisation": "pytorch" if given is None else given}
        return values

    @model_validator(mode="after")
    def _sizes_fit(self) -> StudentConfig:
        self.size.check(self.latent_size)
        if self.family != "MMDiT":
            for key in ("text_width", "text_tokens", "initialisation"):
                if getattr(self, key) is not None:
                    raise ValueError(f"{key} is for MMDiT, not for {self.model}")
        if self.class_token is not None and self.family != "SiT":
            raise ValueError(f"{self.model} cannot denoise a class token: class_token is for SiT")
        return self
