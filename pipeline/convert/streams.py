"""Plans of a conversion: the target's stream for each stream of the source, or a refusal."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from pipeline.store import Store
from pipeline.store.codecs import coarser_than, codec_family, same_numbers
from pipeline.targets.cuts import codec_set_of, cut_columns
from pipeline.targets.tail import first_tail_block
from schemas.calibration import Calibration
from schemas.convert import ConvertConfig
from schemas.errors import UserError
from schemas.extract import Cut, Format
from schemas.networks import TeacherInfo
from schemas.store import Manifest
from schemas.streams import (
    ClassStream,
    Column,
    ComputeInfo,
    LatentsStream,
    Origin,
    Stream,
    TeacherStream,
)

LATER: dict[Cut, tuple[Cut, ...]] = {
    "maps": ("maps",),
    "qk": ("maps", "qk"),
    "activations": ("maps", "qk", "activations"),
    "image": ("maps", "qk", "activations", "image"),
}
"""Cuts that can be computed from each cut: those later in the forward pass."""

OF_LAYERS = ("attention", "query", "key")
"""Columns whose first dimension is the layer, also in their stored arrays."""

VERSIONED = ("torch", "timm", "numpy", "numcodecs")


@dataclass(frozen=True)
class StreamPlan:
    """One stream before and after, the latter without its compute info, tail and origins."""

    source: str
    """Its name in the source."""
    name: str
    """Its name in the target."""
    before: Stream
    after: Stream
    reads: tuple[str, ...] | None = None
    """Columns of the source that are read; None for all."""

    @property
    def added(self) -> bool:
        return not isinstance(self.before, LatentsStream) and self.before.added

    @property
    def tail_moves(self) -> bool:
        """True if the tail that training runs begins at another block or is not needed."""
        a, b = self.before, self.after
        if not (isinstance(a, TeacherStream) and isinstance(b, TeacherStream)):
            return False
        first = first_tail_block(a.cut, a.teacher.layers)
        return a.cut != b.cut or first != first_tail_block(b.cut, b.teacher.layers)

    @property
    def replays(self) -> bool:
        """True if the conversion runs blocks of the teacher."""
        before = self.before
        stored_early = isinstance(before, TeacherStream) and before.cut in {"activations", "image"}
        return stored_early and self.tail_moves

    @property
    def rows(self) -> list[int] | None:
        """Indices of the stored layers in the target; None for all, or when none are stored."""
        a, b = self.before, self.after
        if not (isinstance(a, TeacherStream) and isinstance(b, TeacherStream)):
            return None
        if a.cut not in {"maps", "qk"} or a.teacher.layers == b.teacher.layers:
            return None
        return [a.teacher.layers.index(layer) for layer in b.teacher.layers]

    def copies(self, column: str) -> bool:
        """True if a column's stored arrays, or some of their layers, are copied bit for bit."""
        was = self.before.columns.get(column)
        if was is None or (self.reads is not None and column not in self.reads):
            return False
        return was.codec == self.after.columns[column].codec and not self.replays

    def moves(self, column: str) -> bool:
        """True if a column's numbers are kept bit for bit in another layout."""
        was = self.before.columns.get(column)
        if was is None or self.replays or self.copies(column):
            return False
        return same_numbers(was.codec, self.after.columns[column].codec)

    @property
    def computes(self) -> bool:
        """True if any column is computed rather than copied."""
        return not all(self.copies(column) for column in self.after.columns)


def plan_streams(config: ConvertConfig, store: Store) -> list[StreamPlan]:
    """Every stream of the target. Raises ``UserError`` when the source cannot give it."""
    manifest = store.manifest
    teachers = manifest.teacher_streams
    if config.stream is not None:
        chosen, teacher = manifest.teacher_stream(config.stream)
        teachers = {chosen: teacher}
    plans = []
    for name, stream in manifest.streams.items():
        if isinstance(stream, TeacherStream):
            if name in teachers:
                plans.append(_plan_teacher(config, store, name, stream))
        elif (
            config.stream is None or not isinstance(stream, ClassStream) or _is_of(stream, teachers)
        ):
            plans.append(StreamPlan(name, name, stream, stream))
    names = [plan.name for plan in plans]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        both = " and ".join(f"'{plan.source}'" for plan in plans if plan.name == twice)
        raise UserError(
            f"--cut {config.cut}: streams {both} of '{store.shown_url}' would both be called "
            f"'{twice}': choose one of them with --stream"
        )
    return plans


def _is_of(stream: ClassStream, teachers: Mapping[str, TeacherStream]) -> bool:
    return any(stream.teacher.same_network(one.teacher) for one in teachers.values())


def _plan_teacher(
    config: ConvertConfig, store: Store, name: str, stream: TeacherStream
) -> StreamPlan:
    where = f"stream '{name}' of '{store.shown_url}'"
    cut = config.cut or stream.cut
    if cut not in LATER[stream.cut]:
        raise UserError(
            f"--cut {cut}: {where} keeps the cut '{stream.cut}', from which "
            f"{_WHAT[cut]} cannot be had again: {_extract(store, cut)}"
        )
    teacher = stream.teacher
    if not teacher.layers and cut in {"qk", "activations"}:
        raise UserError(f"--cut {cut}: {where} is without layers, which define this cut: use maps")
    if config.layers is not None:
        _check_layers(config.layers, stream, where, _extract(store, cut))
        teacher = teacher.model_copy(update={"layers": config.layers})
    columns = _columns(config, store.manifest, stream, cut, teacher, where)
    calibration = _calibration(stream, columns, teacher.layers)
    after = stream.model_copy(
        update={"cut": cut, "teacher": teacher, "columns": columns, "calibration": calibration}
    )
    plan = StreamPlan(name, cut if name == stream.cut else name, stream, after)
    if plan.replays:
        return replace(plan, after=after.model_copy(update={"calibration": None}))
    for column, now in columns.items():
        was = stream.columns.get(column)
        if was is None or now.codec == was.codec:
            continue
        levels = _kept_levels(was, stream, teacher.layers)
        stored = f"{codec_family(was.codec)}{min(levels)}" if levels else was.codec
        if coarser_than(stored, now.codec):
            option = f"--codec {config.codec}"
            if column in config.column_codecs:
                option = f"--column-codecs.{column} {now.codec}"
            raise UserError(
                f"{option}: {where} keeps its {column} in {stored}"
                f"{' in a layer' if levels else ''}; {now.codec} would be larger "
                f"and no more faithful: choose a coarser codec, or {_extract(store, cut)}"
            )
    return plan


_WHAT: dict[Cut, str] = {
    "maps": "maps",
    "qk": "queries and keys",
    "activations": "the tokens inside the teacher",
    "image": "the crops",
}


def _extract(store: Store, cut: Cut) -> str:
    return (
        "run the teacher with python -m pipeline.extract "
        f"--store {store.shown_url} --add-stream NAME --cut {cut}"
    )


def _check_layers(layers: tuple[int, ...], stream: TeacherStream, where: str, remedy: str) -> None:
    teacher = stream.teacher
    first = first_tail_block(stream.cut, teacher.layers)
    held = teacher.layers if first is None else tuple(range(first, teacher.depth))
    missing = [layer for layer in layers if layer not in held]
    if missing:
        raise UserError(
            f"--layers {_join(layers)}: {where} cannot give layer {_join(missing)}, only "
            f"{_join(held)}: leave it out, or {remedy} --layers {_join(layers)}"
        )


def _columns(
    config: ConvertConfig,
    manifest: Manifest,
    stream: TeacherStream,
    cut: Cut,
    teacher: TeacherInfo,
    where: str,
) -> dict[str, Column]:
    """The columns of the target's stream: codecs as requested, else those of the source."""
    names = cut_columns(cut, teacher, manifest.resolution, "float32").keys()
    chosen = dict(config.column_codecs)
    own = stream.calibration
    if config.codec is None or (own is not None and config.codec == own.codec):
        chosen = {n: c.codec for n, c in stream.columns.items() if n in names} | chosen
    codec = config.codec or codec_set_of(stream)
    if codec is None and stream.cut != "image" and not names <= chosen.keys():
        missing = ", ".join(name for name in names if name not in chosen)
        raise UserError(
            f"--codec is missing: {where} mixes codecs, which does not tell how to store {missing}"
        )
    compress = config.compress
    columns = cut_columns(
        cut,
        teacher,
        manifest.resolution,
        codec or "faithful",
        chosen,
        compress=_compresses(stream.columns, manifest, stream) if compress is None else compress,
    )
    for name, was in stream.columns.items():  # a column that keeps its codec keeps its bytes
        if name in columns and columns[name].codec == was.codec:
            kept = {"levels": _kept_levels(was, stream, teacher.layers)}
            lossless = {"lossless": was.lossless} if compress is None else {}
            columns[name] = columns[name].model_copy(update={**kept, **lossless})
    return columns


def _kept_levels(column: Column, stream: TeacherStream, layers: tuple[int, ...]) -> tuple[int, ...]:
    """Levels of these layers of a stream's column, where layers have levels of their own."""
    levels = dict(zip(stream.teacher.layers, column.levels, strict=False))
    return tuple(levels[layer] for layer in layers if layer in levels)


def _calibration(
    stream: TeacherStream, columns: Mapping[str, Column], layers: tuple[int, ...]
) -> Calibration | None:
    """The calibration of a stream whose calibrated columns keep their codecs, with the curves of
    these layers."""
    found = stream.calibration
    if found is None:
        return None
    kept = [
        name in columns and columns[name].codec == stream.columns[name].codec
        for name in found.columns
    ]
    curves = tuple(c for c in found.curves if c.layer is None or c.layer in layers)
    return found.model_copy(update={"curves": curves}) if all(kept) else None


def _compresses(columns: Mapping[str, Column], manifest: Manifest, stream: TeacherStream) -> bool:
    """True if a stream was stored with lossless compression where it pays."""
    codecs = {name: column.codec for name, column in columns.items()}
    best = cut_columns(stream.cut, stream.teacher, manifest.resolution, "float32", codecs)
    could = [name for name, column in best.items() if column.lossless != "none"]
    return not could or any(columns[name].lossless != "none" for name in could)


def _join(layers: tuple[int, ...] | list[int]) -> str:
    return ",".join(str(layer) for layer in layers)


def computed_stream(plan: StreamPlan, device: torch.device, format: Format) -> Stream:
    """The stream after a conversion on this machine, without its tail.

    Copied arrays keep the compute info of the source; only their bytes are packed again. Computed
    ones get that of this process, with the precision and batch size of the source (training replays
    a tail with the precision of the blocks before it), and the source stream is recorded.
    """
    before, after = plan.before, plan.after
    if not plan.computes:
        compute = _with_packers(before.compute, before.compute.versions, format)
        return after.model_copy(update={"compute": compute})
    assert isinstance(before, TeacherStream)
    versions = {name: importlib.metadata.version(name) for name in VERSIONED}
    versions["torch"] = torch.__version__  # with the build: last bits depend on the CUDA version
    here = before.compute.model_copy(
        update={
            "device": "cuda" if device.type == "cuda" else "cpu",
            "threads": 0 if device.type == "cuda" else 1,  # threads of the arithmetic of one batch
        }
    )
    return after.model_copy(
        update={
            "compute": _with_packers(here, versions, format),
            "converted_from": (*before.converted_from, origin_of(before)),
        }
    )


def origin_of(stream: TeacherStream) -> Origin:
    return Origin(
        cut=stream.cut,
        layers=stream.teacher.layers,
        codecs={name: column.codec for name, column in stream.columns.items()},
        compute=stream.compute,
    )


def _with_packers(compute: ComputeInfo, versions: dict[str, str], format: Format) -> ComputeInfo:
    """With the versions of the libraries that pack arrays into bytes."""
    versions = {name: version for name, version in versions.items() if name != "zarr"}
    if "numcodecs" in versions:
        versions["numcodecs"] = importlib.metadata.version("numcodecs")
    if format == "zarr":
        versions["zarr"] = importlib.metadata.version("zarr")
    return compute.model_copy(update={"versions": versions})
