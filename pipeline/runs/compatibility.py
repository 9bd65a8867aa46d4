"""Checks of a run's config against its store and its checkpoint, before any worker starts."""

from __future__ import annotations

from pathlib import Path

from pipeline.checkpoints.state import CheckpointState, check_same_run
from pipeline.checkpoints.store_identity import with_stream
from pipeline.targets.sources import check_fit
from schemas.errors import UserError
from schemas.run import RunConfig
from schemas.store import Manifest


def resolve_run(
    config: RunConfig, manifest: Manifest, saved: CheckpointState | None, where: str | Path | None
) -> RunConfig:
    """The config as workers take it: its teacher stream named, checked against the store, and
    against the state ``saved`` of the checkpoint ``where`` from which the run continues. Drivers
    call this once; workers trust the result. Raises ``UserError``."""
    config = with_stream(config, manifest, None if saved is None else saved.store)
    check_store(config, manifest)
    if saved is not None:
        check_same_run(saved, config, str(where))
    return config


def check_store(config: RunConfig, manifest: Manifest) -> None:
    """Raises ``UserError`` where a run cannot be trained on a store with this manifest."""
    check_latents(config, manifest)
    if config.alignment.active:
        check_fit(config.alignment, manifest)


def check_latents(config: RunConfig, manifest: Manifest) -> None:
    """Raises ``UserError`` where the student does not fit the latents and labels of a store."""
    student = config.student
    stored = manifest.autoencoder.latent_shape
    if tuple(stored) != student.latent_shape:
        raise UserError(
            f"the store holds latents {_shape(stored)} of {manifest.resolution} px images; "
            f"{student.model} expects {_shape(student.latent_shape)}: set --student.latent-size "
            f"{stored[1]}"
            + (
                f" --student.latent-channels {stored[0]}"
                if stored[0] != student.latent_channels
                else ""
            )
            + " or use another store"
        )
    if manifest.dataset.num_classes > student.num_classes:
        raise UserError(
            f"the store has {manifest.dataset.num_classes} classes, student.num_classes is "
            f"{student.num_classes}"
        )
    if len(manifest.skipped) == manifest.dataset.samples:
        raise UserError("the store holds no samples: every image was skipped")


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(str(size) for size in shape)
