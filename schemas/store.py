"""The store on paper: its manifest and the commit record of a shard."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from schemas.base import Strict
from schemas.extract import Cut, Precision
from schemas.fields import Layers, Shape, element_count

STORE_VERSION = 1

Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,63}$")]
Version = Annotated[int, Field(ge=1, le=STORE_VERSION)]
Count = Annotated[int, Field(ge=0, le=1 << 40)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Column(Strict):
    """One tensor of every sample."""

    shape: Shape
    """Shape of one sample's array, as the reader sees it."""
    codec: Literal["float16", "float32", "int64", "uint8"]
    """How it is stored."""

    @field_validator("shape")
    @classmethod
    def _bounded(cls, shape: tuple[int, ...]) -> tuple[int, ...]:
        element_count(shape)
        return shape


class Stream(Strict):
    """The smallest thing a reader may skip; one file per shard."""

    kind: Literal["latents", "teacher"]
    columns: dict[Name, Column]


class DatasetInfo(Strict):
    name: str
    source: str | None
    """Where the images were read, without credentials."""
    samples: Count
    """Planned samples, skipped ones included."""
    num_classes: Annotated[int, Field(ge=1)]
    fingerprint: Sha256
    """SHA-256 of every (key, label) in order."""
    order_seed: int


class WeightsFile(Strict):
    """A safetensors file of weights beside the shards."""

    file: Annotated[str, Field(pattern=r"^[a-z0-9_]+\.safetensors$")]
    """Name below the store's root."""
    bytes: Count
    sha256: Sha256
    """Of the file."""


class TeacherInfo(Strict):
    """The teacher whose targets the store holds."""

    model: str
    model_args: dict[str, Any]
    weights: str
    seed: int
    weights_sha256: Sha256
    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    depth: int
    width: int
    heads: int
    grid: tuple[int, int]
    """Patch tokens, rows x columns."""
    layers: Layers


class AutoencoderInfo(Strict):
    name: str
    kind: Literal["AutoencoderKL", "AutoencoderTiny"]
    weights_sha256: Sha256 | None
    """None: it was not run here; the latents were taken over from the data set's source."""
    scaling_factor: float
    shift_factor: float
    latent_shape: tuple[int, int, int]
    """Channels, rows, columns."""


class ComputeInfo(Strict):
    """What decides the last bits of the stored numbers."""

    device: Literal["cpu", "cuda"]
    precision: Precision
    batch_size: int
    threads: int
    versions: dict[str, str]


class SkippedImage(Strict):
    key: str
    path: str
    error: str


class Manifest(Strict):
    """What a store is."""

    version: Version = STORE_VERSION
    format: Literal["webdataset"]
    cut: Cut
    dataset: DatasetInfo
    resolution: int
    teacher: TeacherInfo
    autoencoder: AutoencoderInfo
    compute: ComputeInfo
    streams: dict[Name, Stream]
    tail: WeightsFile | None = None
    """Weights of the part of the teacher that training runs, where the cut leaves one."""
    shard_size: Annotated[int, Field(ge=1, le=1 << 20)]
    num_shards: Annotated[int, Field(ge=0, le=1 << 24)]
    skipped: tuple[SkippedImage, ...] = ()
    """Images left out by --on-bad-image skip; filled in when the extraction is complete."""

    @model_validator(mode="after")
    def _shards_cover_samples(self) -> Manifest:
        if self.num_shards != -(-self.dataset.samples // self.shard_size):
            raise ValueError(
                f"{self.num_shards} shards of {self.shard_size} do not hold "
                f"{self.dataset.samples} samples"
            )
        return self

    @property
    def teacher_streams(self) -> tuple[str, ...]:
        """Names of the streams that only the alignment reads."""
        return tuple(name for name, stream in self.streams.items() if stream.kind == "teacher")


class StreamFile(Strict):
    """One stream of one shard, with what random access and verification need."""

    file: str
    """Path below the store's root."""
    bytes: Count
    sha256: Sha256
    offsets: dict[Name, list[Count]]
    """Per column: where each sample's stored array begins in the file."""
    sizes: dict[Name, list[Count]]
    """Per column: its length in bytes, .npy header included."""
    crc32: dict[Name, list[Annotated[int, Field(ge=0, lt=1 << 32)]]]
    """Per column: CRC-32 of those bytes."""

    @field_validator("file")
    @classmethod
    def _stays_inside(cls, file: str) -> str:
        if not re.fullmatch(r"[a-z0-9_][a-z0-9_.-]*(/[a-z0-9_][a-z0-9_.-]*)*", file):
            raise ValueError(f"{file!r} is not a plain path below the store")
        return file

    @model_validator(mode="after")
    def _ranges_lie_in_file(self) -> StreamFile:
        if not self.offsets.keys() == self.sizes.keys() == self.crc32.keys():
            raise ValueError("offsets, sizes and crc32 name different columns")
        for column, offsets in self.offsets.items():
            sizes = self.sizes[column]
            if not len(offsets) == len(sizes) == len(self.crc32[column]):
                raise ValueError(f"column '{column}' has unequal offsets, sizes and crc32")
            if any(o + n > self.bytes for o, n in zip(offsets, sizes, strict=True)):
                raise ValueError(f"column '{column}' reaches past the end of {self.file}")
        return self


class CommitRecord(Strict):
    """The proof that one shard is complete in all its streams."""

    version: Version = STORE_VERSION
    shard: Count
    samples: Count
    """True count: planned samples less skipped ones."""
    keys: list[str]
    skipped: tuple[SkippedImage, ...] = ()
    streams: dict[Name, StreamFile]

    @model_validator(mode="after")
    def _counts_agree(self) -> CommitRecord:
        lengths = {len(self.keys)}
        for stream in self.streams.values():
            lengths |= {len(column) for column in stream.offsets.values()}
        if lengths != {self.samples}:
            raise ValueError(
                f"record of shard {self.shard} counts {self.samples} samples and lists "
                f"{sorted(lengths)}"
            )
        return self


class StoreIndex(Strict):
    """Sample counts of all shards of a complete store, so that opening it reads one small file."""

    version: Version = STORE_VERSION
    samples_per_shard: list[Count]
    bytes_per_stream: dict[Name, Count]
