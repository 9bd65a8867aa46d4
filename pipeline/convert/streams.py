"""What becomes of each stream of a store, and what cannot be made of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.store import Store
from pipeline.store.codecs.ordering import coarser_than
from pipeline.targets.cuts import codec_set_of, cut_columns
from pipeline.targets.tail import first_tail_block
from schemas.convert import ConvertConfig
from schemas.errors import UserError
from schemas.extract import Cut
from schemas.store import Column, LatentsStream, Manifest, TeacherInfo, TeacherStream

LATER: dict[Cut, tuple[Cut, ...]] = {
    "maps": ("maps",),
    "qk": ("maps", "qk"),
    "activations": ("maps", "qk", "activations"),
    "image": ("maps", "qk", "activations", "image"),
}
"""The cuts that each one can be made into: what comes later in the forward pass."""

OF_LAYERS = ("attention", "query", "key")
"""Columns whose first dimension, also in their stored arrays, is the layers."""


@dataclass(frozen=True)
class StreamPlan:
    """One stream before and after; but for the latter's compute, tail and origins."""

    source: str
    """Its name in the source."""
    name: str
    """Its name in the target."""
    before: LatentsStream | TeacherStream
    after: LatentsStream | TeacherStream

    @property
    def added(self) -> bool:
        return isinstance(self.before, TeacherStream) and self.before.added

    @property
    def tail_moves(self) -> bool:
        """Whether the part of the teacher that training runs begins elsewhere, or is gone."""
        a, b = self.before, self.after
        if not (isinstance(a, TeacherStream) and isinstance(b, TeacherStream)):
            return False
        first = first_tail_block(a.cut, a.teacher.layers)
        return a.cut != b.cut or first != first_tail_block(b.cut, b.teacher.layers)

    @property
    def replays(self) -> bool:
        """Whether blocks of the teacher are run."""
        before = self.before
        stored_early = isinstance(before, TeacherStream) and before.cut in {"activations", "image"}
        return stored_early and self.tail_moves

    @property
    def rows(self) -> list[int] | None:
        """Which of the stored layers are kept; None for all of them, or where none are stored."""
        a, b = self.before, self.after
        if not (isinstance(a, TeacherStream) and isinstance(b, TeacherStream)):
            return None
        if a.cut not in {"maps", "qk"} or a.teacher.layers == b.teacher.layers:
            return None
        return [a.teacher.layers.index(layer) for layer in b.teacher.layers]

    def copies(self, column: str) -> bool:
        """Whether a column's stored arrays are taken over bit by bit (some layers of them)."""
        was = self.before.columns.get(column)
        same = was is not None and was.codec == self.after.columns[column].codec
        return same and not self.replays

    @property
    def computes(self) -> bool:
        """Whether any number is computed anew."""
        return not all(self.copies(column) for column in self.after.columns)


def plan_streams(config: ConvertConfig, store: Store) -> list[StreamPlan]:
    """Every stream of the target. Raises ``UserError`` where it cannot be had from the source."""
    manifest = store.manifest
    teachers = manifest.teacher_streams
    if config.stream is not None:
        chosen, stream = manifest.teacher_stream(config.stream)
        teachers = {chosen: stream}
    plans = []
    for name, one in manifest.streams.items():
        if isinstance(one, LatentsStream):
            plans.append(StreamPlan(name, name, one, one))
        elif name in teachers:
            plans.append(_plan_teacher(config, store, name, one))
    names = [plan.name for plan in plans]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        both = " and ".join(f"'{plan.source}'" for plan in plans if plan.name == twice)
        raise UserError(
            f"--cut {config.cut}: streams {both} of '{store.shown_url}' would both be called "
            f"'{twice}': choose one of them with --stream"
        )
    return plans


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
    if config.layers is not None:
        _check_layers(config.layers, stream, where, _extract(store, cut))
        teacher = teacher.model_copy(update={"layers": config.layers})
    columns = _columns(config, store.manifest, stream, cut, teacher, where)
    after = stream.model_copy(update={"cut": cut, "teacher": teacher, "columns": columns})
    plan = StreamPlan(name, cut if name == stream.cut else name, stream, after)
    if plan.replays:
        return plan
    for column, now in columns.items():
        was = stream.columns.get(column)
        if was is not None and coarser_than(was.codec, now.codec):
            option = f"--codec {config.codec}"
            if column in config.column_codecs:
                option = f"--column-codecs.{column} {now.codec}"
            raise UserError(
                f"{option}: {where} keeps its {column} in {was.codec}; {now.codec} would be larger "
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
    lacking = [layer for layer in layers if layer not in held]
    if lacking:
        raise UserError(
            f"--layers {_join(layers)}: {where} cannot give layer {_join(lacking)}, only "
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
    """The columns of the target's stream: codecs as asked for, else as they were."""
    names = cut_columns(cut, teacher, manifest.resolution, "float32").keys()
    chosen = dict(config.column_codecs)
    if config.codec is None:
        chosen = {n: c.codec for n, c in stream.columns.items() if n in names} | chosen
    codec = config.codec or codec_set_of(stream.columns)
    if codec is None and stream.cut != "image" and not names <= chosen.keys():
        lacking = ", ".join(name for name in names if name not in chosen)
        raise UserError(
            f"--codec is missing: {where} mixes codecs, which does not tell how to store {lacking}"
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
    if compress is None:  # what keeps its codec keeps its bytes
        for name, was in stream.columns.items():
            if name in columns and columns[name].codec == was.codec:
                columns[name] = columns[name].model_copy(update={"lossless": was.lossless})
    return columns


def _compresses(columns: Mapping[str, Column], manifest: Manifest, stream: TeacherStream) -> bool:
    """Whether a stream was made with lossless compression wherever it pays."""
    codecs = {name: column.codec for name, column in columns.items()}
    best = cut_columns(stream.cut, stream.teacher, manifest.resolution, "float32", codecs)
    could = [name for name, column in best.items() if column.lossless != "none"]
    return not could or any(columns[name].lossless != "none" for name in could)


def _join(layers: tuple[int, ...] | list[int]) -> str:
    return ",".join(str(layer) for layer in layers)
