"""The options of ``python -m pipeline.convert``."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from schemas.base import Strict
from schemas.codecs import CodecName, CodecSet
from schemas.extract import Cut, Format
from schemas.fields import Name, RisingLayers


class ConvertConfig(Strict):
    """What to make of a store. What is not said stays as it is there."""

    source: str | None = None
    """Folder or URL of the store that is there. It must be complete."""
    target: str | None = None
    """Folder or URL of the store to make or complete."""
    format: Format | None = None
    """How a shard is written: a tar for each stream, or a zarr v3 shard for each array. The arrays
    stay the same bit for bit."""
    codec: CodecSet | None = None
    """How the teacher's tensors are stored, as for extract: no finer than they are there, except
    that floats may become other floats. Crops, latents and labels are always copied. Default: as
    the source has them; tensors that it lacks, as its others, and 'faithful' where they come from
    crops."""
    column_codecs: dict[Name, CodecName] = Field(default={})
    """Another codec for single tensors, for instance --column-codecs.features rms12."""
    compress: bool | None = None
    """Compress losslessly where it pays."""
    cut: Cut | None = None
    """A later cut of the teacher: 'maps' can be made of 'qk', both of 'activations', and all of
    'image'. The teacher's tail that the source carries is run where that is needed. A stream that
    is called after its cut is called after the new one."""
    layers: RisingLayers | None = None
    """Teacher layers whose attention is kept, 0-based: some of the source's, or any that its tail
    holds. With the cut 'activations' a later first layer moves the cut."""
    stream: Name | None = None
    """The one teacher stream to convert; the target has the latents and this stream, not the
    others. Default: all of them, with the same options."""
    workers: Annotated[int, Field(ge=1, le=256)] | None = None
    """Shards at work at a time, each in a thread that holds a batch in memory (with zarr a shard);
    numbers do not depend on it. Default: one per CPU, 8 at most."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where numbers are computed anew; 'auto' is the GPU where there is one. The manifest tells,
    and a conversion is completed on the same."""
