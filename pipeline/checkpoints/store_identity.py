"""What of a store decides a run's numbers, as names and values that a checkpoint keeps."""

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
"""Begins the names of what only an aligned step reads."""
STREAM = f"{TEACHER}stream"


def store_identity(store: Store, alignment: AlignmentConfig) -> dict[str, Any]:
    """Dotted names and plain values. What does not change a number (format, lossless compression,
    other teachers' streams) is left out."""
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
    return identity


def with_stream(
    config: RunConfig, manifest: Manifest, saved: Mapping[str, Any] | None
) -> RunConfig:
    """The run with its teacher stream named: that which the checkpoint followed whose
    ``store_identity`` is ``saved``, else the only one that the store has now. Streams that are
    added later change nothing for runs that have begun. Raises ``UserError``."""
    if not config.alignment.active or config.alignment.stream is not None:
        return config
    name = (saved or {}).get(STREAM) or manifest.teacher_stream()[0]
    return config.model_copy(
        update={"alignment": config.alignment.model_copy(update={"stream": name})}
    )


def check_store_identity(
    saved: dict[str, Any], now: dict[str, Any], *, aligned: bool, where: object
) -> None:
    """Raises ``UserError`` where a checkpoint was trained on another store than this; once the
    teacher has gone, its stream may be what it likes."""
    for name in {**saved, **now}:
        if not aligned and name.startswith(TEACHER):
            continue
        if saved.get(name) != now.get(name):
            raise UserError(
                f"checkpoint '{where}' was trained on another store: its {name} was "
                f"{saved.get(name)}, now it is {now.get(name)}; give the run another --name"
            )


def _columns(columns: dict[str, Column]) -> dict[str, str]:
    """Codec and shape of each."""
    return {
        name: f"{column.codec} {'x'.join(map(str, column.shape))}".strip()
        for name, column in sorted(columns.items())
    }
