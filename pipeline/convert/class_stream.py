"""A class stream computed from a teacher stream of the same store, to which it is added: neither
images nor the teacher's first blocks are needed."""

from __future__ import annotations

from typing import Literal

import torch

from pipeline.convert.converters import open_converter
from pipeline.convert.job import convert_missing, one_thread_each, require_precision
from pipeline.convert.shard import Group
from pipeline.convert.streams import StreamPlan, computed_stream, origin_of
from pipeline.precision import choose_device
from pipeline.store import Store
from pipeline.store.layout import MANIFEST
from pipeline.store.manifest_diff import require_equal
from pipeline.targets.cuts import class_columns, codec_set_of
from pipeline.targets.tail import load_tail
from pipeline.teachers.manifest_check import has_class_token
from schemas.codecs import CodecName
from schemas.errors import UserError
from schemas.fields import CLASS, class_stream_name
from schemas.store import Manifest
from schemas.streams import CLASS_CODECS, ClassStream, ClassToken, TeacherStream

REPLAYED = ("activations", "image")
"""Cuts whose tail is run for the class token."""


def is_class_stream(name: str, manifest: Manifest) -> bool:
    """True if --add-stream NAME asks for class tokens: names of older teacher streams, which may be
    like those of class streams, do not."""
    named = name == CLASS or name.endswith(f"_{CLASS}")
    return named and name not in manifest.teacher_streams


def add_class_stream(
    store: Store,
    name: str,
    token: ClassToken = "class",
    *,
    codec: CodecName | None = None,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    workers: int | None = None,
) -> tuple[Store, int]:
    """Add the class stream ``name``, or complete it. ``codec`` is that of computed tokens; those of
    a column ``class_token`` are copied. Returns the store and the number of samples written.

    Raises ``UserError`` where the store cannot give the tokens.
    """
    source, teacher_stream = _source(store, name)
    store.require_complete("latents", source)
    held = store.manifest.streams.get(name)
    if isinstance(held, ClassStream):
        if held.token != token:
            raise UserError(
                f"--add-stream {name}: the store's stream '{name}' was made with class_token "
                f"{held.token}, not {token}"
            )
        if not held.converted_from:
            store.require_complete(name)
            return store, 0
    chosen = torch.device(choose_device(device))
    plan = _plan(store, name, source, teacher_stream, token, codec)
    if teacher_stream.cut in REPLAYED:
        require_precision(plan, chosen)
    wanted = computed_stream(plan, chosen, store.manifest.format).model_copy(
        update={"converted_from": (*teacher_stream.converted_from, origin_of(teacher_stream))}
    )

    def with_stream(manifest: Manifest) -> Manifest:
        return manifest.model_copy(update={"streams": {**manifest.streams, name: wanted}})

    store = store.update(lambda now: now if name in now.streams else with_stream(now))
    require_equal(
        store.manifest,
        with_stream(store.manifest),
        [],
        where=f"store '{store.shown_url}'",
        what="this command",
        remedy=f"complete stream '{name}' with the same options, device and library versions",
    )
    missing = store.missing_shards(name)
    if missing:
        with one_thread_each():
            tail = None
            if teacher_stream.cut in REPLAYED:
                tail = load_tail(store, source, teacher_stream.teacher.layers).to(chosen)
            converters = {name: open_converter(plan, tail, chosen)}
            convert_missing(store, store, [Group(name, [plan])], converters, workers)
    store.finish()
    return store, sum(store.record(shard, name).samples for shard in missing)


def _source(store: Store, name: str) -> tuple[str, TeacherStream]:
    """The teacher stream whose class tokens the stream ``name`` holds. Raises ``UserError``."""
    held = store.manifest.teacher_streams
    if name == CLASS:
        found = [source for source, stream in held.items() if not stream.added]
    else:
        found = [source for source in held if class_stream_name(source, added=True) == name]
    if len(found) != 1:
        names = ", ".join(class_stream_name(source, added=True) for source in held)
        raise UserError(
            f"--add-stream {name}: store '{store.shown_url}' has no teacher stream to compute it "
            f"from; it can compute {names or 'no class tokens'}; teacher streams have other names"
        )
    return found[0], held[found[0]]


def _plan(
    store: Store,
    name: str,
    source: str,
    before: TeacherStream,
    token: ClassToken,
    codec: CodecName | None,
) -> StreamPlan:
    """The class stream without its compute info and origins. Raises ``UserError``."""
    where = f"{store.shown_url}/{MANIFEST}: streams.{source}.teacher"
    own = has_class_token(before.teacher, store.manifest.resolution, where)
    if token == "class" and not own:
        raise UserError(
            f"--add-stream {name}: teacher '{before.teacher.model}' of stream '{source}' has no "
            "class token; --class-token mean takes the mean of its patch tokens"
        )
    column = before.columns.get("class_token")
    reads: tuple[str, ...] = ("class_token",)
    if column is not None and own == (token == "class"):  # else it is the other vector
        if column.codec not in CLASS_CODECS:
            raise UserError(
                f"--add-stream {name}: stream '{source}' holds these vectors in {column.codec}, a "
                f"class stream takes {', '.join(CLASS_CODECS)}: extract another teacher stream"
            )
        if codec not in {None, column.codec}:
            raise UserError(
                f"--add-stream {name}: stream '{source}' holds these vectors in {column.codec}, "
                f"which are copied: leave out --column-codecs.class_token {codec}"
            )
        columns = {"class_token": column}
    else:
        reads = tuple(n for n in ("features", "tokens", "crop") if n in before.columns)
        codecs = {} if codec is None else {"class_token": codec}
        default = codec_set_of(before) or "faithful"
        columns = class_columns(before.teacher.width, default, codecs)
    stream = ClassStream(
        kind="class",
        columns=columns,
        token=token,
        teacher=before.teacher.model_copy(update={"layers": ()}),
        compute=before.compute,
        added=True,
    )
    return StreamPlan(source, name, before, stream, reads)
