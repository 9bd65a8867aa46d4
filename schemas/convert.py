"""Options of ``python -m pipeline.convert``."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from schemas.base import Strict
from schemas.codecs import CodecName, CodecSet
from schemas.extract import Cut, Format
from schemas.fields import Name, RisingLayers


class ConvertConfig(Strict):
    """The conversion of a store. Properties without an option stay as they are in the source."""

    source: str | None = None
    """Folder or URL of the store to convert. It must be complete."""
    target: str | None = None
    """Folder or URL of the store to make or complete."""
    format: Format | None = None
    """Format of a shard: a tar per stream, or a zarr v3 shard per array. The arrays stay
    bit-identical."""
    codec: CodecSet | None = None
    """Codecs of the teacher's tensors, as for extract. They cannot be finer than the source's,
    except that a float type may become another one. Crops, latents and labels are always copied.
    Default: the source's codecs, also for new tensors; 'faithful' for tensors computed from
    crops."""
    column_codecs: dict[Name, CodecName] = Field(default={})
    """Codecs of single tensors, for instance --column-codecs.features rms12."""
    compress: bool | None = None
    """Compress losslessly where that saves space. Default: as the source."""
    cut: Cut | None = None
    """A later cut of the teacher: 'maps' can be computed from 'qk', both from 'activations', and
    all from 'image'. The teacher's tail in the source is run where that is needed. A stream named
    after its cut is named after the new one."""
    layers: RisingLayers | None = None
    """Teacher layers whose attention is stored, 0-based: a subset of the source's, or any in its
    tail. With the cut 'activations' a later first layer moves the cut."""
    stream: Name | None = None
    """The only teacher stream to convert; the target then holds the latents and this stream.
    Default: all of them, with the same options."""
    workers: Annotated[int, Field(ge=1, le=256)] | None = None
    """Shards converted at the same time, each in a thread that holds a batch in memory (with zarr a
    shard). It does not change the result. Default: one per CPU, at most 8."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device for tensors that are computed anew; 'auto' is the GPU if there is one. It is written
    to the manifest, and a conversion must be completed on the same type of device."""
