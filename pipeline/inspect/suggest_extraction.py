"""Suggested command that adds one teacher stream to a store."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from pipeline.store import Store
from pipeline.targets.cuts import codec_set_of, cut_columns, stepped_columns
from pipeline.teachers.manifest_check import teacher_config
from pipeline.teachers.vit import create_meta_vit
from schemas.codecs import PROMISES, CodecSet
from schemas.errors import UserError
from schemas.extract import Cut, ExtractConfig, TeacherConfig
from schemas.store import Manifest
from schemas.streams import TeacherStream

DEFAULT_CUT: Cut = "activations"
"""Cut for a store without a teacher stream: it serves most layer maps for the fewest bytes."""


class SuggestedExtraction(NamedTuple):
    """A stream and the command that adds it."""

    stream: str
    command: str


def suggest_extraction(
    store: Store, name: str | None, layers: Sequence[int], cut: Cut | None = None
) -> SuggestedExtraction:
    """``python -m pipeline.extract ... --add-stream NAME`` for a stream of the store's own teacher
    with ``layers``, by default those that it has, and of ``cut``, by default its own. An incomplete
    stream ``name`` with these layers is completed with the options
    that it was started with; if a stream ``name`` has other layers, a free name is chosen.

    Raises ``UserError`` if the teacher does not have these layers.
    """
    manifest = store.manifest
    held = manifest.teacher_streams
    existing = held.get(name) if name is not None else None
    pattern = existing or next(iter(held.values()), None)
    if pattern is not None:
        layers = layers or pattern.teacher.layers
    if existing is not None and (
        set(layers) != set(existing.teacher.layers) or cut not in (None, existing.cut)
    ):
        existing = name = None
        pattern = next(iter(held.values()))
    cut = cut or (DEFAULT_CUT if pattern is None else pattern.cut)
    if pattern is not None:
        depth = pattern.teacher.depth
        if max(layers) >= depth:
            raise UserError(f"the store's teacher has layers 0 to {depth - 1} only")
        if not pattern.teacher.layers:
            _require_attention(pattern, manifest.resolution)
    chosen = sorted(set(layers))
    name = name or _free_name(manifest, cut, chosen)
    options = ["--store", store.shown_url, "--add-stream", name]
    options += ["--cut", cut, "--layers", ",".join(str(layer) for layer in chosen)]
    if manifest.dataset.source is not None:
        options += ["--source", manifest.dataset.source]
    if pattern is not None:
        options += _teacher(pattern)
        if cut == pattern.cut:
            options += _codecs(pattern, manifest.resolution)
        if existing is not None:  # all shards of a stream must be computed in the same way
            options += ["--batch-size", str(existing.compute.batch_size)]
            options += ["--precision", existing.compute.precision]
    return SuggestedExtraction(name, shlex.join(["python", "-m", "pipeline.extract", *options]))


def _require_attention(stream: TeacherStream, resolution: int) -> None:
    """Raises ``UserError`` where a stream was extracted without layers because its teacher's
    attention cannot be read."""
    model = stream.teacher.model
    try:
        create_meta_vit(teacher_config(stream.teacher), resolution)
    except UserError:
        raise UserError(
            f"the attention of the store's teacher '{model}' cannot be read: its stream serves "
            "feature losses alone, attention_weight 0; for others add a stream of another teacher"
        ) from None


def _free_name(manifest: Manifest, cut: Cut, layers: Sequence[int]) -> str:
    """A name from cut and layers that no stream of the store has."""
    base = f"{cut}_{'_'.join(str(layer) for layer in layers)}"[:56]
    number, name = 1, base
    while name in manifest.streams:
        number += 1
        name = f"{base}_v{number}"
    return name


def _teacher(stream: TeacherStream) -> Iterator[str]:
    teacher = stream.teacher
    yield from ("--teacher.model", teacher.model, "--teacher.weights", teacher.weights)
    yield from ("--teacher.image-size", str(teacher.image_size))
    if teacher.statistics_of == "options":
        yield from ("--teacher.mean", ",".join(map(str, teacher.mean)))
        yield from ("--teacher.std", ",".join(map(str, teacher.std)))
    if teacher.resize != TeacherConfig.model_fields["resize"].default:
        yield from ("--teacher.resize", teacher.resize)
    if teacher.weights == "random":
        yield from ("--teacher.seed", str(teacher.seed))
    for key, value in teacher.model_args.items():
        yield from (f"--teacher.model-args.{key}", json.dumps(value))


def _codecs(stream: TeacherStream, resolution: int) -> Iterator[str]:
    """Options that store the tensors as ``stream`` does."""
    codec = codec_set_of(stream) or "faithful"
    if stream.calibration is not None:
        yield from _promise(stream, resolution)
        return
    for compress in (True, False):
        made = cut_columns(stream.cut, stream.teacher, resolution, codec, compress=compress)
        if made == stream.columns:
            yield from _codec_set(codec, compress)
            return
    compress = any(column.lossless != "none" for column in stream.columns.values())
    yield from _codec_set("faithful", compress)
    for name, column in stream.columns.items():
        yield from (f"--column-codecs.{name}", column.codec)


def _codec_set(codec: CodecSet, compress: bool) -> Iterator[str]:
    if codec != ExtractConfig.model_fields["codec"].default.name:
        yield from ("--codec", codec)
    if not compress:
        yield from ("--compress", "false")


def _promise(stream: TeacherStream, resolution: int) -> Iterator[str]:
    """Options of a calibrated stream: those that keep its promise, and codecs that it fixed."""
    assert stream.calibration is not None
    codec, promise = stream.calibration.codec, stream.calibration.promise
    made = cut_columns(stream.cut, stream.teacher, resolution, codec)
    compresses, may = (
        any(column.lossless != "none" for column in some.values())
        for some in (stream.columns, made)
    )
    yield from _codec_set(codec, compresses or not may)
    if promise != PROMISES[codec]:
        for key, value in promise.model_dump().items():
            yield from (f"--codec.{key.replace('_', '-')}", str(value))
    fixed = stream.columns.keys() - stream.calibration.columns
    stepped = stepped_columns(fixed, ())  # they would be calibrated otherwise
    for name, column in stream.columns.items():
        if name in stepped or (name in fixed and column.codec != made[name].codec):
            yield from (f"--column-codecs.{name}", column.codec)
