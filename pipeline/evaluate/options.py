"""Checks of an evaluation's options that need neither images nor torch."""

from __future__ import annotations

from pathlib import Path

from pipeline.storage.files import absolute_url, redact
from pipeline.storage.npz import Archive
from schemas.errors import UserError
from schemas.evaluate import EvaluateConfig


def check_options(config: EvaluateConfig) -> str:
    """Path or URL of the reference, after checking the combination of options and that local files
    exist. Raises ``UserError``."""
    if config.reference is None:
        raise UserError("--reference is missing: an .npz, a folder of images or a store")
    if config.samples is None and config.save_reference is None:
        raise UserError("--samples is missing: an .npz, a folder of images or a store")
    if config.record is not None and config.samples is None:
        raise UserError("--record adds an evaluation of samples to a run: give --samples")
    if config.save_reference is not None and not config.save_reference.endswith(".npz"):
        raise UserError(f"--save-reference '{config.save_reference}' must end in .npz")
    if config.clip_weights is None and "clip" in config.model_fields_set:
        raise UserError(f"--clip-weights is missing: FILE, hub or random for --clip {config.clip}")
    if config.clip_weights is not None and config.samples is None:
        raise UserError("--clip-weights is for the captions of samples: give --samples")
    if config.network is not None and config.inception_resizing != "tensorflow":
        raise UserError("--inception-resizing is of Inception, and --network is another one")
    if config.network is None:
        for key in ("network_weights", "network_size", "network_args"):
            if getattr(config, key):
                option = key.replace("_", "-")
                raise UserError(f"--{option} needs --network ID, which is missing")
    elif config.network_weights is None:
        raise UserError(
            f"--network-weights is missing: FILE, hub or random for --network {config.network}"
        )
    elif config.inception_weights is not None:
        raise UserError("--network and --inception-weights: fid uses one network, give one option")
    for option, place in (("--samples", config.samples), ("--reference", config.reference)):
        if place is not None and "://" not in place:
            _require(option, place)
    return config.reference


def _require(option: str, place: str) -> None:
    if place.endswith(".npz"):
        Archive(place, option)
    elif not Path(absolute_url(place)).exists():
        raise UserError(
            f"{option} '{redact(place)}' does not exist; expected an .npz, a folder of images or a "
            "store"
        )
