"""The identity of a store: properties that decide a run's numbers, saved in its checkpoints."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from pipeline.store import Store
from pipeline.store.codecs import plain_layout
from schemas.alignment import AlignmentConfig, place
from schemas.errors import UserError
from schemas.fields import TEXT
from schemas.networks import TeacherInfo, TextEncoderInfo
from schemas.run import RunConfig
from schemas.store import Manifest
from schemas.streams import Column

Run = TypeVar("Run", bound=RunConfig)
TEACHER = "teacher."
"""Prefix of the properties that only Phase I depends on."""
CLASS_STREAM = "class_token.stream"
TEXT_STREAM = "text.stream"


def _prefix(number: int) -> str:
    """Prefix of the properties of the stream with this number in ``AlignmentConfig.streams``."""
    return f"{TEACHER}{number}." if number else TEACHER


def store_identity(
    store: Store,
    alignment: AlignmentConfig,
    class_stream: str | None = None,
    text: tuple[str, TextEncoderInfo] | None = None,
) -> dict[str, Any]:
    """Properties by dotted name. Those that change no number (format, lossless compression, other
    teachers' streams) are left out. ``class_stream``: that of a student with a class token;
    ``text``: the stream of a student with captions, and the encoder in use."""
    manifest = store.manifest
    vae = manifest.autoencoder
    counts = json.dumps(store.index().samples_per_shard).encode()
    identity: dict[str, Any] = {
        "dataset.fingerprint": manifest.dataset.fingerprint,
        "resolution": manifest.resolution,
        "shard_size": manifest.shard_size,
        "samples_per_shard.sha256": hashlib.sha256(counts).hexdigest(),
        "autoencoder.weights_sha256": vae.weights_sha256,
        "autoencoder.scaling_factor": vae.scaling_factor,
        "autoencoder.shift_factor": vae.shift_factor,
        "latents.columns": _columns(manifest.streams["latents"].columns),
    }
    for key in ("latents_mean", "latents_std"):
        if getattr(vae, key) is not None:
            identity[f"autoencoder.{key}"] = list(getattr(vae, key))
    if class_stream is not None:
        tokens = manifest.class_streams[class_stream]
        identity |= {
            CLASS_STREAM: class_stream,
            "class_token.token": tokens.token,
            "class_token.columns": _columns(tokens.columns),
            **_teacher("class_token.", tokens.teacher),
        }
    if text is not None:
        stream_name, encoder = text
        captions = manifest.text_streams[stream_name]
        columns = {name: column for name, column in captions.columns.items() if name != TEXT}
        identity |= {
            TEXT_STREAM: stream_name,
            "text.captions_sha256": captions.captions_sha256,
            "text.null_sha256": captions.null.sha256,
            "text.encoder": encoder.encoder,
            "text.weights_sha256": encoder.weights_sha256,
            "text.tokenizer_sha256": captions.encoder.tokenizer_sha256,
            "text.columns": _columns(columns),
        }
    for number, options in enumerate(alignment.streams):
        name, stream = manifest.teacher_stream(options.stream)
        at = _prefix(number)
        identity |= {
            f"{at}stream": name,
            f"{at}cut": stream.cut,
            **_teacher(at, stream.teacher),
            f"{at}tail.sha256": stream.tail.sha256 if stream.tail else None,
            f"{at}columns": _columns(stream.columns),
        }
    return identity


def _teacher(at: str, teacher: TeacherInfo) -> dict[str, Any]:
    """Properties of a teacher, with ``at`` before their names."""
    identity: dict[str, Any] = {
        f"{at}model": teacher.model,
        f"{at}weights_sha256": teacher.weights_sha256,
    }
    if teacher.statistics_of == "options":  # those of a model's name follow from it
        identity |= {f"{at}mean": list(teacher.mean), f"{at}std": list(teacher.std)}
    if teacher.resize != "bicubic":
        identity[f"{at}resize"] = teacher.resize
    return identity


def with_stream(
    config: RunConfig, manifest: Manifest, saved: Mapping[str, Any] | None
) -> RunConfig:
    """The config with its teacher streams named: those in ``saved``, the ``store_identity`` of
    the run's checkpoint, else the only one of the store. Streams that are added to a store later
    do not change runs that have begun. The class stream of a student with a class token, and the
    text stream of one with captions, are named likewise. Raises ``UserError``."""
    alignment = with_saved_streams(config.alignment, saved or {})
    if any(options.stream is None for options in alignment.streams):
        alignment = _map_streams(alignment, lambda number: _only_stream(manifest, place(number)))
    config = config.model_copy(update={"alignment": alignment})
    if config.student.family == "MMDiT":
        name = config.diffusion.text_stream or (saved or {}).get(TEXT_STREAM)
        return with_text(config, manifest, name)
    if config.student.class_token is None:
        return config
    name = config.diffusion.class_stream or (saved or {}).get(CLASS_STREAM)
    name = choose_class_stream(config, manifest, name)
    diffusion = config.diffusion.model_copy(update={"class_stream": name})
    return config.model_copy(update={"diffusion": diffusion})


def _only_stream(manifest: Manifest, at: str) -> str:
    """Name of the store's only teacher stream. Raises ``UserError`` that names the key ``at``."""
    try:
        return manifest.teacher_stream()[0]
    except UserError as error:
        raise UserError(f"{at}.stream: {error}") from None


def with_text(config: Run, manifest: Manifest, name: str | None) -> Run:
    """The config of a student that reads captions with its text stream named: ``name``, by default
    the only one; and with that stream's sizes in the student. Raises ``UserError`` where the
    student states others."""
    try:
        chosen, stream = manifest.text_stream(name)
    except UserError as error:
        option = " (--diffusion.text-stream)" if manifest.text_streams else ""
        raise UserError(f"{config.student.model} reads captions: {error}{option}") from None
    sizes = {"text_tokens": stream.encoder.tokens, "text_width": stream.encoder.width}
    for key, stored in sizes.items():
        stated = getattr(config.student, key)
        if stated not in (None, stored):
            raise UserError(
                f"student.{key} is {stated}, the captions of text stream '{chosen}' have {stored}: "
                f"set --student.{key.replace('_', '-')} {stored}, or leave it out"
            )
    student = config.student.model_copy(update=sizes)
    diffusion = config.diffusion.model_copy(update={"text_stream": chosen})
    return config.model_copy(update={"student": student, "diffusion": diffusion})


def choose_class_stream(config: RunConfig, manifest: Manifest, name: str | None) -> str:
    """The class stream ``name``, by default that of the teacher that the run aligns to, else the
    only one. Raises ``UserError`` where its tokens do not fit the student; means of patches are
    used only where their stream is named."""
    teacher = config.alignment.stream if config.alignment.active else None
    chosen, stream = manifest.class_stream(name or teacher)
    if stream.token != "class" and name is None:
        raise UserError(
            f"the teacher of class stream '{chosen}' has no class token, only the mean of its "
            f"patches: set --diffusion.class-stream {chosen} if that is meant"
        )
    width = stream.teacher.width
    if width != config.student.class_token:
        raise UserError(
            f"student.class_token is {config.student.class_token}, the tokens of class stream "
            f"'{chosen}' have {width} numbers: set --student.class-token {width}"
        )
    return chosen


def with_saved_streams(alignment: AlignmentConfig, saved: Mapping[str, Any]) -> AlignmentConfig:
    """The alignment with the streams of a ``store_identity``, where it does not name them."""
    return _map_streams(alignment, lambda number: saved.get(f"{_prefix(number)}stream"))


def _map_streams(
    alignment: AlignmentConfig, name_of: Callable[[int], str | None]
) -> AlignmentConfig:
    """The alignment with ``name_of(number)`` as the name of each stream that has none."""
    named = [options.stream or name_of(number) for number, options in enumerate(alignment.streams)]
    if not named:
        return alignment
    others = tuple(
        options.model_copy(update={"stream": name})
        for options, name in zip(alignment.others, named[1:], strict=True)
    )
    return alignment.model_copy(update={"stream": named[0], "others": others})


def check_store_identity(
    saved: dict[str, Any], now: dict[str, Any], *, aligned: bool, where: object
) -> None:
    """Raises ``UserError`` where a checkpoint was trained on another store. After the termination
    (``aligned`` False) the teacher stream is not compared."""
    for name in {**saved, **now}:
        if not aligned and name.startswith(TEACHER):
            continue
        if saved.get(name) != now.get(name):
            raise UserError(
                f"checkpoint '{where}' was trained on another store: its {name} was "
                f"{saved.get(name)}, now it is {now.get(name)}; give the run another --name"
            )


def _columns(columns: dict[str, Column]) -> dict[str, str]:
    """Codec, shape and levels of single layers of each column; layouts of the same numbers are
    equal, so that a store may be converted between them during a run."""
    return {name: _column(column) for name, column in sorted(columns.items())}


def _column(column: Column) -> str:
    parts = [plain_layout(column.codec), "x".join(map(str, column.shape))]
    parts += [f"levels {','.join(map(str, column.levels))}"] if column.levels else []
    return " ".join(parts).strip()
