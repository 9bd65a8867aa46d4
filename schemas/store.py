"""Schemas of a store's files: manifest, commit record of a shard, index."""

from __future__ import annotations

import re
from operator import add
from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from schemas.base import Strict
from schemas.classes import ClassName, ClassNumber, ClassTable, check_classes
from schemas.codecs import CalibratedSet, CodecName, Lossless, Promise
from schemas.cuts import cut_shapes
from schemas.errors import UserError
from schemas.extract import (
    Crop,
    Cut,
    Dataset,
    Format,
    Precision,
    Resize,
    Resolution,
    Split,
    TeacherSize,
)
from schemas.fields import (
    CLASS,
    MAX_CLASSES,
    TEXT,
    ModelArguments,
    ModelId,
    Name,
    Seed,
    Sha256,
    Shape,
    StoredLayers,
    StreamName,
    class_stream_name,
    element_count,
)

STORE_VERSION = 2

PartName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,63}(\.[a-z][a-z0-9_]{0,31})?$")]
"""Name of a column, or ``column.part`` if its codec stores several arrays."""
Version = Annotated[int, Field(ge=STORE_VERSION, le=STORE_VERSION)]
Count = Annotated[int, Field(ge=0, le=1 << 40)]
Size = Annotated[int, Field(ge=1, le=1 << 16)]
Place = Annotated[str, Field(max_length=4096)]
"""A path, a URL or an id on the hub."""
Finite = Annotated[float, Field(allow_inf_nan=False)]
Scale = Annotated[float, Field(gt=0, allow_inf_nan=False)]

# The largest models that timm knows are 64 blocks deep and 4096 numbers, or 32 heads, wide.
MAX_DEPTH = 128
Depth = Annotated[int, Field(ge=1, le=MAX_DEPTH)]
Width = Annotated[int, Field(ge=1, le=1 << 13)]
Heads = Annotated[int, Field(ge=1, le=128)]
GridSide = Annotated[int, Field(ge=1, le=256)]
"""Patch tokens per row or column; the largest crop has 256, of 16 pixels each."""


def _is_none(value: object) -> bool:
    return value is None


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


ADDED_KEYS = ("class_names", "empty_classes")
"""Keys of ``DatasetInfo`` that stores of earlier versions lack."""


MAX_CAPTION_BYTES = 1 << 12
"""UTF-8 bytes of a caption; encoders read less."""
MAX_CAPTIONS = 7
"""Captions of an image that a store keeps, the first ones; MS-COCO has 5 to 7."""


class CaptionCounts(Strict):
    """Captions of a data set, and what was left out of it."""

    captions: Count
    """Captions of the planned samples."""
    empty: Count = 0
    """Blank captions, which were left out."""
    beyond_limit: Count = 0
    """Captions after the first ``MAX_CAPTIONS`` of an image, which were left out."""
    images_without: Count = 0
    """Images without captions, which were left out."""
    without_images: Count = 0
    """Images that have captions and are missing."""
    shortened: Count = 0
    """Captions of more than ``MAX_CAPTION_BYTES``, whose end was left out."""


class DatasetInfo(Strict):
    name: Dataset
    source: Place | None
    """Path or URL of the images, without credentials."""
    samples: Count
    """Planned samples, skipped ones included."""
    num_classes: Annotated[int, Field(ge=1, le=MAX_CLASSES)]
    fingerprint: Sha256
    """SHA-256 of every (key, label) in order."""
    order_seed: int
    class_names: tuple[ClassName, ...] = ()
    """Names of the classes, in the order of class numbers: class folders, ImageNet's WNIDs. Empty
    where the source has numbers only, and in stores of earlier versions."""
    empty_classes: tuple[ClassNumber, ...] = ()
    """Numbers of the classes without images, rising; not known in stores of earlier versions."""
    split: Split | None = Field(default=None, exclude_if=_is_none)
    """Split of MS-COCO."""
    dummy_class: bool = Field(default=False, exclude_if=lambda dummy: not dummy)
    """True where images have captions and no labels: every label is 0."""
    captions: CaptionCounts | None = Field(default=None, exclude_if=_is_none)
    """Captions of the images; None where they were not looked for."""
    captions_from: Place | None = Field(default=None, exclude_if=_is_none)
    """Members or file of the captions, where an option names them."""

    @model_validator(mode="after")
    def _names_each_class(self) -> DatasetInfo:
        check_classes(self.num_classes, self.class_names, self.empty_classes)
        return self

    @model_serializer(mode="wrap")
    def _without_unknown(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Keys that earlier versions did not write are left out where they hold nothing."""
        values: dict[str, Any] = handler(self)
        return {k: v for k, v in values.items() if k not in ADDED_KEYS or v}

    @property
    def classes(self) -> ClassTable:
        return ClassTable(count=self.num_classes, names=self.class_names, empty=self.empty_classes)


class WeightsFile(Strict):
    """A safetensors file of weights in the store's root."""

    file: Annotated[str, Field(pattern=r"^[a-z0-9_]+\.safetensors$")]
    """Name below the store's root."""
    bytes: Count
    sha256: Sha256
    """SHA-256 of the file."""


class TeacherInfo(Strict):
    """The teacher whose targets the store holds."""

    model: ModelId
    model_args: ModelArguments
    weights: Place
    seed: Seed
    weights_sha256: Sha256
    image_size: TeacherSize
    mean: tuple[Finite, Finite, Finite]
    std: tuple[Scale, Scale, Scale]
    statistics_of: Literal["model", "options"] = Field(
        default="model", exclude_if=lambda source: source == "model"
    )
    """Source of mean and std: the model's name in timm, or options."""
    resize: Resize = Field(default="bicubic", exclude_if=lambda resize: resize == "bicubic")
    """Interpolation from the normalised crop to the input."""
    depth: Depth
    width: Width
    heads: Heads
    head_width: Width
    """Width of one head's query or key."""
    grid: tuple[GridSide, GridSide]
    """Patch tokens, rows x columns."""
    prefix: Annotated[int, Field(ge=0, le=1 << 10)]
    """Class and register tokens, which precede the patch tokens."""
    layers: StoredLayers = Field(default=(), exclude_if=lambda layers: not layers)
    """Layers whose attention the stream provides, 0-based; empty where it provides none."""

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> TeacherInfo:
        """Checked before a model is built, because a depth of 100,000 takes an hour to build."""
        if self.heads * self.head_width != self.width:
            raise ValueError(
                f"{self.heads} heads of {self.head_width} numbers are not a width of {self.width}"
            )
        if self.layers and self.layers[-1] >= self.depth:
            raise ValueError(f"there is no layer {self.layers[-1]} in a depth of {self.depth}")
        arguments = {"depth": self.depth}
        if self.layers:  # others may have a neck, and blocks without heads
            arguments |= {"embed_dim": self.width, "num_heads": self.heads}
        for name in ("depth_token_only", "cls_attn_layers"):  # blocks of CaiT and XCiT
            if name in self.model_args and self.model_args[name] not in range(MAX_DEPTH + 1):
                raise ValueError(f"model_args.{name} is not a number of blocks")
        for name, value in arguments.items():
            if self.model_args.get(name, value) != value:
                raise ValueError(f"model_args.{name} is not {value}, as the rest says")
        return self

    def same_network(self, other: TeacherInfo) -> bool:
        """True if equal images give equal tokens: the layers of the streams, and the place of the
        weights, may differ."""
        update = {"layers": (), "weights": ""}
        return self.model_copy(update=update) == other.model_copy(update=update)


AutoencoderKind = Literal[
    "AutoencoderKL",
    "AutoencoderTiny",
    "AsymmetricAutoencoderKL",
    "AutoencoderDC",
    "AutoencoderKLFlux2",
    "AutoencoderKLHunyuanImage",
    "AutoencoderKLQwenImage",
    "AutoencoderKLWan",
    "VQModel",
]
"""Classes of diffusers."""


class AutoencoderInfo(Strict):
    name: Place
    kind: AutoencoderKind
    weights_sha256: Sha256 | None
    """None: it was not run; the latents are those of the data set's source."""
    scaling_factor: Scale
    shift_factor: Finite
    latents_mean: tuple[Finite, ...] | None = Field(default=None, exclude_if=_is_none)
    """One number per channel, which takes the place of the shift factor: students see
    (z - mean) * scaling_factor / std."""
    latents_std: tuple[Scale, ...] | None = Field(default=None, exclude_if=_is_none)
    latent_shape: tuple[Size, Size, Size]
    """Channels, rows, columns."""

    @model_validator(mode="after")
    def _statistics_are_of_channels(self) -> AutoencoderInfo:
        lengths = [None if s is None else len(s) for s in (self.latents_mean, self.latents_std)]
        if lengths not in ([None] * 2, [self.latent_shape[0]] * 2):
            raise ValueError("latents_mean and latents_std do not have a number for each channel")
        return self


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


class TargetErrors(Strict):
    """Mean errors of targets."""

    kl: Finite | None
    """KL divergence of attention rows in nats; None without layers."""
    feature_cosine: Finite
    """Cosine of the features of a token."""
    gradient_cosine: Finite
    """Cosine of the gradients of the alignment losses on a random student."""

    def keep(self, promise: Promise) -> bool:
        return (
            (self.kl or 0.0) <= promise.kl
            and self.feature_cosine >= promise.feature_cosine
            and self.gradient_cosine >= promise.gradient_cosine
        )


class CalibrationPoint(Strict):
    """Mean errors with one step."""

    codec: CodecName
    kl: Finite | None = Field(default=None, exclude_if=_is_none)
    """KL divergence of attention rows in nats: of the layer, or of all that the column serves."""
    feature_cosine: Finite | None = Field(default=None, exclude_if=_is_none)
    share: Finite
    """Largest error, with its sampling error, as a share of what the promise allows: at most
    1 - ``Calibration.margin`` for a step that keeps it."""


class CalibrationCurve(Strict):
    """Errors by step of one column, or of one layer of one or two columns, and the choice."""

    columns: Annotated[tuple[Name, ...], Field(min_length=1, max_length=2)]
    """Columns that share the step: tokens, features, attention, or query and key."""
    layer: Annotated[int, Field(ge=0, le=MAX_DEPTH)] | None = Field(
        default=None, exclude_if=_is_none
    )
    """Teacher layer, 0-based; None for a column that is not of layers."""
    codec: CodecName
    """Codec with the chosen levels."""
    points: Annotated[tuple[CalibrationPoint, ...], Field(max_length=64)]
    """By rising levels."""


class Calibration(Strict):
    """Measurement that chose the steps of a stream's codecs, before its first shard was written.

    The reference are the teacher's targets in the precision of the extraction, without a codec.
    """

    codec: CalibratedSet
    promise: Promise
    margin: Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]
    """Share of the promise that was kept free, beside two standard errors of each mean."""
    seed: Seed
    """Seed of the choice of images."""
    images: Annotated[int, Field(ge=1)]
    """Number of images that were to be measured."""
    keys: tuple[str, ...]
    """Keys of those that could be read."""
    curves: tuple[CalibrationCurve, ...]
    errors: TargetErrors
    """Errors with the chosen steps."""
    arithmetic: TargetErrors | None = Field(default=None, exclude_if=_is_none)
    """Errors of the extraction's arithmetic alone, against float32; None for float32."""

    @property
    def columns(self) -> set[str]:
        """Columns whose steps it chose."""
        return {column for curve in self.curves for column in curve.columns}


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
    calibration: Calibration | None = Field(default=None, exclude_if=_is_none)
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


class TextEncoderInfo(Strict):
    """The text encoder of a stream of captions."""

    encoder: Place
    weights: Place
    seed: Seed
    model_args: ModelArguments
    weights_sha256: Sha256 | None
    """None: it was not run; the stream holds tokens, or the embeddings of the source."""
    tokenizer: Place
    tokenizer_sha256: Sha256 | None
    """SHA-256 of the tokenizer's vocabulary and rules; None: it was not run."""
    tokens: Annotated[int, Field(ge=1, le=1 << 12)]
    """Tokens of a caption, padding included."""
    width: Width
    """Numbers of a token's embedding."""


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
    truncated: Count | None = Field(default=None, exclude_if=_is_none)
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


class SkippedImage(Strict):
    key: str
    path: str
    error: str


Checksum = Literal["crc32", "crc32c"]


class Manifest(Strict):
    """Description of a store: manifest.json."""

    version: Version
    format: Format
    dataset: DatasetInfo
    resolution: Resolution
    crop: Crop = Field(default="adm", exclude_if=lambda crop: crop == "adm")
    """Square that was cut out of each image."""
    autoencoder: AutoencoderInfo
    streams: dict[StreamName, Stream]
    shard_size: Annotated[int, Field(ge=1, le=1 << 20)]
    num_shards: Annotated[int, Field(ge=0, le=1 << 24)]
    skipped: tuple[SkippedImage, ...] = ()
    """Images left out by --on-bad-image skip; filled in when the extraction is complete."""
    checksum: Checksum = Field(default="crc32", exclude_if=lambda kind: kind == "crc32")
    """Checksums in commit records: CRC-32C, which processors compute faster, or CRC-32 in stores of
    earlier versions and what is converted from them."""

    @model_validator(mode="after")
    def _shards_cover_samples(self) -> Manifest:
        if self.num_shards != -(-self.dataset.samples // self.shard_size):
            raise ValueError(
                f"{self.num_shards} shards of {self.shard_size} do not hold "
                f"{self.dataset.samples} samples"
            )
        return self

    @model_validator(mode="after")
    def _latents_are_there(self) -> Manifest:
        latents = self.streams.get("latents")
        if not isinstance(latents, LatentsStream):
            raise ValueError("there is no stream 'latents' of kind latents")
        if sum(isinstance(stream, LatentsStream) for stream in self.streams.values()) > 1:
            raise ValueError("only the stream 'latents' can be of kind latents")
        shape = self.autoencoder.latent_shape
        if not shape[1] == shape[2] <= self.resolution:
            raise ValueError(f"latents of {shape} are not those of square images")
        expected = {"mean": shape, "std": shape, "label": ()}
        if {name: column.shape for name, column in latents.columns.items()} != expected:
            raise ValueError(f"stream 'latents' is not a mean and a std of {shape} and a label")
        for name, column in latents.columns.items():
            if column.codec not in LATENT_CODECS[name]:
                raise ValueError(
                    f"column '{name}' of stream 'latents' is of codec {column.codec}, not "
                    f"{' or '.join(LATENT_CODECS[name])}"
                )
        return self

    @model_validator(mode="after")
    def _streams_hold_their_cuts(self) -> Manifest:
        """Checked here, so that readers can rely on the shapes of tensors."""
        for name, stream in self.teacher_streams.items():
            if stream.cut == "activations" and not stream.teacher.layers:
                raise ValueError(f"stream '{name}' is of cut 'activations' and names no layers")
            expected = cut_shapes(stream.cut, stream.teacher, self.resolution)
            if {column: spec.shape for column, spec in stream.columns.items()} != expected:
                raise ValueError(
                    f"stream '{name}' does not hold what its cut '{stream.cut}' keeps of such a "
                    "teacher"
                )
            if stream.cut == "image" and stream.columns["crop"].codec != "uint8":
                raise ValueError(f"stream '{name}' stores crops in another codec than uint8")
        for name, tokens in self.class_streams.items():
            shapes = {column: spec.shape for column, spec in tokens.columns.items()}
            if shapes != {"class_token": (tokens.teacher.width,)}:
                raise ValueError(f"stream '{name}' is not a class_token of the teacher's width")
            codec = tokens.columns["class_token"].codec
            if codec not in CLASS_CODECS:
                raise ValueError(f"stream '{name}' is of codec {codec}, which is not a float type")
            if tokens.token == "class" and not tokens.teacher.prefix:
                raise ValueError(f"stream '{name}' is of a teacher without a class token")
        return self

    @property
    def teacher_streams(self) -> dict[str, TeacherStream]:
        """The streams that only the alignment uses."""
        streams = self.streams.items()
        return {name: stream for name, stream in streams if isinstance(stream, TeacherStream)}

    @property
    def class_streams(self) -> dict[str, ClassStream]:
        """The streams of class tokens, which a run may read in both phases."""
        streams = self.streams.items()
        return {name: stream for name, stream in streams if isinstance(stream, ClassStream)}

    @property
    def text_streams(self) -> dict[str, TextStream]:
        """The streams of captions, which an MMDiT reads in both phases."""
        streams = self.streams.items()
        return {name: stream for name, stream in streams if isinstance(stream, TextStream)}

    @property
    def weights_files(self) -> dict[str, WeightsFile]:
        """The safetensors files in the store's root, by stream: tails of teachers and null
        captions."""
        tails = {n: stream.tail for n, stream in self.teacher_streams.items()}
        files = {**tails, **{n: stream.null for n, stream in self.text_streams.items()}}
        return {name: file for name, file in files.items() if file is not None}

    @property
    def base_streams(self) -> dict[str, Stream]:
        """The streams that share commit records with the latents."""
        streams = self.streams.items()
        return {n: s for n, s in streams if isinstance(s, LatentsStream) or not s.added}

    def text_stream(self, name: str | None = None) -> tuple[str, TextStream]:
        """The stream of captions called ``name``, or the only one. Raises ``UserError``."""
        streams = self.text_streams
        held = ", ".join(streams)
        if not streams:
            raise UserError("the store holds no captions: add them with extract --add-stream text")
        if name is None and len(streams) > 1:
            raise UserError(f"the store holds several streams of captions: choose one of {held}")
        chosen = next(iter(streams)) if name is None else name
        if chosen not in streams:
            raise UserError(f"the store holds no stream of captions '{chosen}', only {held}")
        return chosen, streams[chosen]

    def teacher_stream(self, name: str | None = None) -> tuple[str, TeacherStream]:
        """The teacher stream called ``name``, or the only one. Raises ``UserError``."""
        streams = self.teacher_streams
        if not streams:
            raise UserError("the store holds no teacher stream: add one with extract --add-stream")
        held = ", ".join(streams)
        if name is None and len(streams) > 1:
            raise UserError(f"the store holds several teacher streams: choose one of {held}")
        chosen = next(iter(streams)) if name is None else name
        if chosen not in streams:
            raise UserError(f"the store holds no teacher stream '{chosen}', only {held}")
        return chosen, streams[chosen]

    def class_stream(self, name: str | None = None) -> tuple[str, ClassStream]:
        """The class stream called ``name``, or that of the teacher of the teacher stream ``name``,
        or the only one. Raises ``UserError``."""
        streams = self.class_streams
        held = ", ".join(streams)
        if name is None:
            if len(streams) == 1:
                return next(iter(streams.items()))
            if streams:
                raise UserError(
                    f"the store holds several class streams: choose one of {held} with "
                    "--diffusion.class-stream"
                )
            raise UserError(f"the store holds no class stream: {_add_class_stream(CLASS)}")
        if name in streams:
            return name, streams[name]
        stream = self.teacher_streams.get(name)
        if stream is None:
            raise UserError(f"the store holds no class stream '{name}', only {held or 'none'}")
        usual = class_stream_name(name, added=stream.added)
        same = [n for n, s in streams.items() if s.teacher.same_network(stream.teacher)]
        if not same:
            raise UserError(
                f"the store holds no class tokens of stream '{name}': {_add_class_stream(usual)}"
            )
        chosen = usual if usual in same else same[0]
        return chosen, streams[chosen]


def _add_class_stream(name: str) -> str:
    return f"compute it with python -m pipeline.extract --store STORE --add-stream {name}"


class StreamFile(Strict):
    """A file of one stream and shard, with offsets and checksums of its samples."""

    file: str
    """Path below the store's root."""
    bytes: Count
    sha256: Sha256
    offsets: dict[PartName, list[Count]]
    """Per array: offset of each sample's stored bytes in the file."""
    sizes: dict[PartName, list[Count]]
    """Per array: number of these bytes, after lossless compression, with a .npy header in tars."""
    crc32: dict[PartName, list[Annotated[int, Field(ge=0, lt=1 << 32)]]]
    """Per array: checksum of those bytes, of the kind that the manifest names."""

    @field_validator("file")
    @classmethod
    def _stays_inside(cls, file: str) -> str:
        if not re.fullmatch(r"[a-z0-9_][a-z0-9_.-]*(/[a-z0-9_][a-z0-9_.-]*)*", file):
            raise ValueError(f"{file!r} is not a plain path below the store")
        return file

    @model_validator(mode="after")
    def _ranges_lie_in_file(self) -> StreamFile:
        if not self.offsets.keys() == self.sizes.keys() == self.crc32.keys():
            raise ValueError("offsets, sizes and crc32 name different arrays")
        for part, offsets in self.offsets.items():
            sizes = self.sizes[part]
            if not len(offsets) == len(sizes) == len(self.crc32[part]):
                raise ValueError(f"array '{part}' has unequal offsets, sizes and crc32")
            if max(map(add, offsets, sizes), default=0) > self.bytes:
                raise ValueError(f"array '{part}' reaches past the end of {self.file}")
        return self


class RecordedCaptions(Strict):
    """Captions of one text stream in one shard."""

    counts: list[Annotated[int, Field(ge=1, le=MAX_CAPTIONS)]]
    """Captions of each sample, so that a visit's caption is known before it is read."""
    truncated: Count
    """Captions that were longer than the encoder's input."""


class CommitRecord(Strict):
    """The proof that one shard is complete in all streams that were written together."""

    version: Version
    shard: Count
    samples: Count
    """Number of stored samples: planned samples minus skipped ones."""
    keys: list[str]
    skipped: tuple[SkippedImage, ...] = ()
    streams: dict[StreamName, tuple[StreamFile, ...]]
    """One tar per stream, or one zarr shard per array."""
    captions: dict[StreamName, RecordedCaptions] = Field(
        default={}, exclude_if=lambda captions: not captions
    )
    """By text stream."""

    @model_validator(mode="after")
    def _counts_agree(self) -> CommitRecord:
        lengths = {len(self.keys)}
        for files in self.streams.values():
            bare = [file.file for file in files if not file.offsets]
            if bare:
                raise ValueError(f"{bare[0]} holds no array")
            parts = [part for file in files for part in file.offsets]
            if len(parts) != len(set(parts)):
                raise ValueError(f"record of shard {self.shard} lists an array twice")
            lengths |= {len(file.offsets[part]) for file in files for part in file.offsets}
        lengths |= {len(recorded.counts) for recorded in self.captions.values()}
        if lengths != {self.samples}:
            raise ValueError(
                f"record of shard {self.shard} counts {self.samples} samples and lists "
                f"{sorted(lengths)}"
            )
        return self


class StoreIndex(Strict):
    """Sample counts of all shards of a complete store, so that one small file is read to open
    it."""

    version: Version
    samples_per_shard: list[Count]
    bytes_per_stream: dict[StreamName, Count]
