"""The identity of a store: properties that decide a run's numbers, saved in its checkpoints."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from pipeline.store import Store
from schemas.alignment import AlignmentConfig
from schemas.errors import UserError
from schemas.run import RunConfig
from schemas.store import Column, Manifest

TEACHER = "teacher."
"""Prefix of the properties that only Phase I depends on."""
STREAM = f"{TEACHER}stream"


def store_identity(store: Store, alignment: AlignmentConfig) -> dict[str, Any]:
    """Properties by dotted name. Those that change no number (format, lossless compression, other
    teachers' streams) are left out."""
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
    if alignment.active:
        name, stream = manifest.teacher_stream(alignment.stream)
        identity |= {
            STREAM: name,
            f"{TEACHER}cut": stream.cut,
            f"{TEACHER}model": stream.teacher.model,
            f"{TEACHER}weights_sha256": stream.teacher.weights_sha256,
            f"{TEACHER}tail.sha256": stream.tail.sha256 if stream.tail else None,
            f"{TEACHER}columns": _columns(stream.columns),
        }
        if stream.teacher.statistics_of == "options":  # those of a model's name follow from it
            identity[f"{TEACHER}mean"] = list(stream.teacher.mean)
            identity[f"{TEACHER}std"] = list(stream.teacher.std)
        if stream.teacher.resize != "bicubic":
            identity[f"{TEACHER}resize"] = stream.teacher.resize
    return identity


def with_stream(
    config: RunConfig, manifest: Manifest, saved: Mapping[str, Any] | None
) -> RunConfig:
    """The config with its teacher stream named: the stream in ``saved``, the ``store_identity`` of
    the run's checkpoint, else the only one of the store. Streams that are added to a store later
    do not change runs that have begun. Raises ``UserError``."""
    if not config.alignment.active or config.alignment.stream is not None:
        return config
    name = (saved or {}).get(STREAM) or manifest.teacher_stream()[0]
    return config.model_copy(
        update={"alignment": config.alignment.model_copy(update={"stream": name})}
    )


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
    """Codec and shape of each column."""
    return {
        name: f"{column.codec} {'x'.join(map(str, column.shape))}".strip()
        for name, column in sorted(columns.items())
    }
