"""Schemas of a store's streams: latents, teacher, class tokens, captions."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from schemas.base import Strict
from schemas.calibration import Calibration
from schemas.codecs import CodecName, Lossless
from schemas.extract import Cut, Precision
from schemas.fields import TEXT, Count, Name, Sha256, Shape, StoredLayers, element_count, is_none
from schemas.networks import TeacherInfo, TextEncoderInfo, WeightsFile

LAYERED_CODECS = ("heads", "sqrt")
"""Codecs whose tensors and arrays begin with a dimension of layers, which may differ in levels."""
LETTERS = "abcdefghijklmnopqrstuvwxyz"
Levels = Annotated[int, Field(ge=1, le=9999)]
"""Number at the end of a codec's name: levels per RMS, or per unit."""


class Column(Strict):
    """One tensor of every sample."""

    shape: Shape
    """Shape of one sample's tensor before encoding and after decoding."""
    codec: CodecName
    """Codec of its numbers, which are stored as one or several arrays."""
    lossless: Lossless = "none"
    """Lossless compression of the bytes of its arrays."""
    levels: tuple[Levels, ...] = Field(default=(), exclude_if=lambda levels: not levels)
    """Levels of each layer, where a calibration gave layers different ones: at most those in the
    codec's name. Encoders need them; decoders do not, because the arrays hold the steps."""

    @field_validator("shape")
    @classmethod
    def _bounded(cls, shape: tuple[int, ...]) -> tuple[int, ...]:
        element_count(shape)
        return shape

    @model_validator(mode="after")
    def _levels_are_of_layers(self) -> Column:
        if not self.levels:
            return self
        if not self.codec.startswith(LAYERED_CODECS) or len(self.shape) != 4:
            raise ValueError(f"codec {self.codec} has no levels of single layers")
        if len(self.levels) != self.shape[0]:
            raise ValueError(f"there are {len(self.levels)} levels for {self.shape[0]} layers")
        if int(self.codec.lstrip(LETTERS)) < max(self.levels):
            raise ValueError(f"a layer has more levels than its codec {self.codec}")
        return self


MAX_CAPTIONS = 7
"""Captions of an image that a store keeps, the first ones; MS-COCO has 5 to 7."""


class ComputeInfo(Strict):
    """Properties that determine the last bits of the stored numbers."""

    device: Literal["cpu", "cuda"]
    precision: Precision
    batch_size: Annotated[int, Field(ge=1)]
    threads: Annotated[int, Field(ge=0)]
    versions: dict[str, str]


LATENT_CODECS: dict[str, tuple[CodecName, ...]] = {
    "mean": ("float16", "float32"),
    "std": ("float16", "float32"),
    "label": ("int64",),
}
"""Codecs of the columns of latents, which are read without decoding."""


class LatentsStream(Strict):
    """The autoencoder's posterior and the label of every sample."""

    kind: Literal["latents"]
    columns: dict[Name, Column]
    compute: ComputeInfo


class Origin(Strict):
    """The stream that ``python -m pipeline.convert``, or ``extract --add-stream class``, computed
    a stream from."""

    cut: Cut
    layers: StoredLayers = Field(default=(), exclude_if=lambda layers: not layers)
    codecs: dict[Name, CodecName]
    """Codecs of its columns, whose rounding errors remain in the present stream."""
    compute: ComputeInfo


class TeacherStream(Strict):
    """Tensors of one cut of one teacher."""

    kind: Literal["teacher"]
    cut: Cut
    columns: dict[Name, Column]
    teacher: TeacherInfo
    tail: WeightsFile | None = None
    """Weights of the part of the teacher that training runs, if the cut has one."""
    compute: ComputeInfo
    added: bool = False
    """True if it was added after the latents, with its own commit records."""
    converted_from: tuple[Origin, ...] = ()
    """Streams from which it was converted, first to last; empty if it was extracted directly.
    ``compute`` is that of the last conversion."""
    calibration: Calibration | None = Field(default=None, exclude_if=is_none)
    """Measurement that chose the steps of its codecs; None for fixed steps."""

    @model_validator(mode="after")
    def _calibrates_its_columns(self) -> TeacherStream:
        if self.calibration is not None and not self.calibration.columns <= self.columns.keys():
            raise ValueError(f"its calibration is not of its columns {', '.join(self.columns)}")
        return self


CLASS_CODECS: tuple[CodecName, ...] = ("float16", "bfloat16", "float32")
"""Codecs of class tokens."""

ClassToken = Literal["class", "mean"]
"""Vector of a class stream, after the teacher's final norm: the class token, or the mean of the
patch tokens."""


class ClassStream(Strict):
    """The teacher's class token of every image, which REG trains as data in both phases (arXiv
    2507.01467, section 3)."""

    kind: Literal["class"]
    columns: dict[Name, Column]
    """``class_token`` alone, of the teacher's width. It is neither scaled nor normalised."""
    token: ClassToken = Field(default="class", exclude_if=lambda token: token == "class")
    """'mean' only where it was asked for: not each teacher has a class token."""
    teacher: TeacherInfo
    """Without layers, because none has a part in it."""
    compute: ComputeInfo
    added: bool = False
    """True if it was added after the latents, with its own commit records."""
    converted_from: tuple[Origin, ...] = Field(default=(), exclude_if=lambda origins: not origins)
    """Streams from which it was computed, first to last; empty if it was extracted directly."""


class TextStream(Strict):
    """The captions of every image: embeddings or token ids, and the texts."""

    kind: Literal["text"]
    keeps: Literal["embeddings", "tokens"]
    columns: dict[Name, Column]
    """``caption0``, ``caption1``, ... for the captions of an image, (tokens, width) or ids
    (tokens,), 0 where an image has fewer; ``lengths`` (captions,), the tokens of each caption
    before truncation, 0 where there is none; ``text``, UTF-8 texts separated by zeros, unless
    unknown."""
    captions: Annotated[int, Field(ge=1, le=MAX_CAPTIONS)]
    """Largest number of captions of an image."""
    captions_sha256: Sha256
    """SHA-256 of every key and its captions in order."""
    encoder: TextEncoderInfo
    truncated: Count | None = Field(default=None, exclude_if=is_none)
    """Captions that were longer than the encoder's input; filled in when the stream is complete."""
    null: WeightsFile
    """``tokens`` of the empty caption, and its ``embeddings`` in float32: the input without a
    caption."""
    compute: ComputeInfo
    added: bool = False
    """True if it was added after the latents, with its own commit records."""

    @model_validator(mode="after")
    def _columns_are_of_captions(self) -> TextStream:
        tokens, width = self.encoder.tokens, self.encoder.width
        embeds = self.keeps == "embeddings"
        shapes = {n: column.shape for n, column in self.columns.items() if n != TEXT}
        one = (tokens, width) if embeds else (tokens,)
        expected = {caption_column(n): one for n in range(self.captions)}
        if shapes != {**expected, LENGTHS: (self.captions,)}:
            raise ValueError(f"its columns are not {self.captions} captions of {one} and lengths")
        text = self.columns.get(TEXT)
        codecs = {LENGTHS: "int64", **({} if embeds else dict.fromkeys(expected, "int64"))}
        codecs |= {} if text is None else {TEXT: "uint8"}
        if text is not None and len(text.shape) != 1:
            raise ValueError("its column 'text' is not a row of bytes")
        for name, codec in codecs.items():
            if self.columns[name].codec != codec:
                raise ValueError(f"its column '{name}' is not of codec {codec}")
        return self


LENGTHS = "lengths"


def caption_column(number: int) -> str:
    """Name of the column of an image's caption ``number``, from 0."""
    return f"caption{number}"


Stream = Annotated[
    LatentsStream | TeacherStream | ClassStream | TextStream, Field(discriminator="kind")
]
"""The smallest unit that a reader can skip."""
