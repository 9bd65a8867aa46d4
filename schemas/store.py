"""Schemas of a store's files: manifest, commit record of a shard, index."""

from __future__ import annotations

import re
from operator import add
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    Field,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from schemas.base import Strict
from schemas.classes import ClassName, ClassNumber, ClassTable, check_classes
from schemas.cuts import cut_shapes
from schemas.errors import UserError
from schemas.extract import Crop, Dataset, Format, Resolution, Split
from schemas.fields import (
    CLASS,
    MAX_CLASSES,
    Count,
    Place,
    Sha256,
    StreamName,
    class_stream_name,
    is_none,
)
from schemas.networks import AutoencoderInfo, WeightsFile
from schemas.streams import (
    CLASS_CODECS,
    LATENT_CODECS,
    MAX_CAPTIONS,
    ClassStream,
    LatentsStream,
    Stream,
    TeacherStream,
    TextStream,
)

STORE_VERSION = 2

S = TypeVar("S")
PartName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,63}(\.[a-z][a-z0-9_]{0,31})?$")]
"""Name of a column, or ``column.part`` if its codec stores several arrays."""
Version = Annotated[int, Field(ge=STORE_VERSION, le=STORE_VERSION)]

ADDED_KEYS = ("class_names", "empty_classes")
"""Keys of ``DatasetInfo`` that stores of earlier versions lack."""

MAX_CAPTION_BYTES = 1 << 12
"""UTF-8 bytes of a caption; encoders read less."""


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
    split: Split | None = Field(default=None, exclude_if=is_none)
    """Split of MS-COCO."""
    dummy_class: bool = Field(default=False, exclude_if=lambda dummy: not dummy)
    """True where images have captions and no labels: every label is 0."""
    captions: CaptionCounts | None = Field(default=None, exclude_if=is_none)
    """Captions of the images; None where they were not looked for."""
    captions_from: Place | None = Field(default=None, exclude_if=is_none)
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
        if not streams:
            raise UserError("the store holds no captions: add them with extract --add-stream text")
        return _chosen(streams, name, "stream of captions", "streams of captions")

    def teacher_stream(self, name: str | None = None) -> tuple[str, TeacherStream]:
        """The teacher stream called ``name``, or the only one. Raises ``UserError``."""
        streams = self.teacher_streams
        if not streams:
            raise UserError("the store holds no teacher stream: add one with extract --add-stream")
        return _chosen(streams, name, "teacher stream", "teacher streams")

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


def _chosen(streams: dict[str, S], name: str | None, one: str, several: str) -> tuple[str, S]:
    held = ", ".join(streams)
    if name is None and len(streams) > 1:
        raise UserError(f"the store holds several {several}: choose one of {held}")
    chosen = next(iter(streams)) if name is None else name
    if chosen not in streams:
        raise UserError(f"the store holds no {one} '{chosen}', only {held}")
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
