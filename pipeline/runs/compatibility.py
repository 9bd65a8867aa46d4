"""Checks of a run's config against its store and its checkpoint, before any worker starts."""

from __future__ import annotations

import logging
from pathlib import Path

from pipeline.checkpoints.state import CheckpointState, check_same_run
from pipeline.checkpoints.store_identity import with_stream
from pipeline.datasets.class_names import class_numbers
from pipeline.targets.sources import check_fit
from schemas.classes import ClassTable
from schemas.errors import UserError
from schemas.run import RunConfig
from schemas.store import Manifest

logger = logging.getLogger(__name__)


def resolve_run(
    config: RunConfig, manifest: Manifest, saved: CheckpointState | None, where: str | Path | None
) -> RunConfig:
    """The config for the workers: its teacher stream named, checked against the store, and
    against the state ``saved`` of the checkpoint ``where`` from which the run continues. Drivers
    call this once; workers trust the result. Raises ``UserError``."""
    config = with_stream(config, manifest, None if saved is None else saved.store)
    config = with_classes(config, manifest, saved)
    check_store(config, manifest, saved)
    if saved is not None:
        check_same_run(saved, config, str(where))
    return config


def with_classes(
    config: RunConfig, manifest: Manifest, saved: CheckpointState | None = None
) -> RunConfig:
    """The config with the student's number of classes, where it does not state one: that of the
    run's checkpoint, else of the store."""
    if "num_classes" in config.student.model_fields_set:
        return config
    count = saved.config.student.num_classes if saved else manifest.dataset.num_classes
    student = config.student.model_copy(update={"num_classes": count})
    return config.model_copy(update={"student": student})


def check_store(
    config: RunConfig, manifest: Manifest, saved: CheckpointState | None = None
) -> None:
    """Raises ``UserError`` where a run cannot be trained on a store with this manifest. ``saved``
    is the state that it continues from."""
    check_latents(config, manifest)
    check_classes(config, manifest, saved)
    if (warning := ignored_captions(config, manifest)) is not None:
        logger.warning("%s", warning)
    if config.alignment.active:
        check_fit(config.alignment, manifest)


def ignored_captions(config: RunConfig, manifest: Manifest) -> str | None:
    """Warning where images have captions and no classes, and the student reads only classes."""
    if config.student.family == "MMDiT" or not manifest.dataset.dummy_class:
        return None
    return (
        f"{config.student.model} does not read captions, and the store's images have no classes: "
        "it learns to draw without a condition (MMDiT reads captions)"
    )


def check_latents(config: RunConfig, manifest: Manifest) -> None:
    """Raises ``UserError`` where the student does not fit the latents of a store."""
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
    if len(manifest.skipped) == manifest.dataset.samples:
        raise UserError("the store holds no samples: every image was skipped")


def check_classes(
    config: RunConfig, manifest: Manifest, saved: CheckpointState | None = None
) -> None:
    """Raises ``UserError`` where the student's classes are not the store's. A run of an earlier
    version that began with more classes than its store has is continued."""
    stored, wanted = manifest.dataset.num_classes, config.student.num_classes
    if stored != wanted and (stored > wanted or saved is None):
        raise UserError(
            f"the store has {stored} classes, student.num_classes is {wanted}: set "
            f"--student.num-classes {stored}, leave it out, or use another store"
        )
    if stored != wanted:
        logger.warning(
            "the store has %d classes, the run began with student.num_classes %d: classes from %d "
            "on are not trained",
            stored,
            wanted,
            stored,
        )
    if config.samples.every is not None and config.samples.classes is not None:
        grid_classes(config, manifest.dataset.classes)


def grid_classes(config: RunConfig, classes: ClassTable) -> tuple[int, ...]:
    """Numbers of the classes in a run's grids of samples, one per row. Raises ``UserError`` where
    the store lacks one."""
    chosen = config.samples.classes
    if chosen is None:
        return classes.trained[:8]
    if not chosen:
        raise UserError(
            f"--samples.classes is empty: the store has classes 0 to {classes.count - 1}"
        )
    return class_numbers(chosen, classes, option="--samples.classes")


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(str(size) for size in shape)
