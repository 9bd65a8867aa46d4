"""Whether a run can be trained on a store."""

from __future__ import annotations

from pipeline.targets.sources import check_fit
from schemas.errors import UserError
from schemas.run import RunConfig
from schemas.store import Manifest


def check_store(config: RunConfig, manifest: Manifest) -> None:
    """Raises ``UserError`` where this run cannot be trained on a store with this manifest."""
    check_latents(config, manifest)
    if config.alignment.active:
        check_fit(config.alignment, manifest)


def check_latents(config: RunConfig, manifest: Manifest) -> None:
    """Raises ``UserError`` where the student cannot be trained on the latents and labels, whatever
    it is aligned with."""
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
