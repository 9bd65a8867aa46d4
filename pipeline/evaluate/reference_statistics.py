"""Statistics of a reference in ADM's format: .npz of mu, sigma, mu_s, sigma_s.

Ours hold more: features, for precision and recall, DINOv2's moments, and in ``about`` which
networks all of it is of. ADM's own files say nothing of that and are Inception's.
"""

from __future__ import annotations

import json
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.evaluate.features.base import Network
from pipeline.evaluate.features.timm_network import FeatureNetwork
from pipeline.evaluate.frechet import Moments
from pipeline.evaluate.images.sources import IMAGES
from pipeline.evaluate.measure import FeatureBuffer, Measured
from pipeline.storage.files import open_url, publish
from pipeline.storage.npz import ABOUT, Archive, read_about
from schemas.errors import UserError

VERSION = 1
INCEPTION = "inception-v3"
SPATIAL, DINOV2 = "_s", "_dinov2"
"""Ends of the names of other moments than the network's own."""
FEATURES = "features"
MAX_WIDTH = 1 << 13
MAX_FEATURES = 1 << 20


def has_statistics(archive: Archive) -> bool:
    """Whether there are moments in it."""
    return "mu" in archive and "sigma" in archive


def has_points(archive: Archive) -> bool:
    """Whether precision and recall can be had of it, by images or by features that were kept."""
    return IMAGES in archive or FEATURES in archive


def save_statistics(
    place: str, measured: Measured, network: Network, dinov2: FeatureNetwork | None
) -> None:
    """Write all that is known of a reference, atomically. Raises ``UserError``."""
    about = {
        "version": VERSION,
        "samples": measured.count,
        "images": measured.kind,
        "network": network.identity,
        "dinov2": None if dinov2 is None else dinov2.identity,
    }
    arrays: dict[str, np.ndarray] = {ABOUT: np.array(json.dumps(about))}
    ends = {"": measured.moments, SPATIAL: measured.spatial, DINOV2: measured.dinov2}
    for end, moments in ends.items():
        if moments is not None:
            arrays[f"mu{end}"] = moments.mean.cpu().numpy()
            arrays[f"sigma{end}"] = moments.covariance.cpu().numpy()
    if measured.features is not None:
        arrays[FEATURES] = measured.features
    filesystem, path = open_url(place, what="--save-reference")
    try:
        with tempfile.TemporaryDirectory() as folder:
            local = Path(folder) / "statistics.npz"
            with zipfile.ZipFile(local, "w", allowZip64=True) as zipped:
                for name, array in arrays.items():  # one by one: features are a memory map
                    with zipped.open(f"{name}.npy", "w", force_zip64=True) as member:
                        np.lib.format.write_array(member, array, allow_pickle=False)
            publish(filesystem, local, path)
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"--save-reference '{place}' cannot be written: {error}") from None


def load_statistics(
    archive: Archive, network: Network, dinov2: FeatureNetwork | None, manifold: int
) -> Measured:
    """What a file says, where it is of this network. Raises ``UserError`` naming what differs."""
    about = read_about(archive)
    moments = load_moments(archive, network)
    of_dinov2 = None
    if dinov2 is not None and f"mu{DINOV2}" in archive:
        found = _identity(about, "dinov2")
        if found is not None:
            _check_same(archive, found, dinov2.identity, "DINOv2 ")
            of_dinov2 = _moments(archive, DINOV2)
    samples = about.get("samples")
    return Measured(
        count=samples if type(samples) is int else 0,
        kind=str(about.get("images") or "statistics in ADM's format"),
        moments=moments,
        features=_features(archive, len(moments.mean), manifold),
        spatial=_moments(archive, SPATIAL) if f"mu{SPATIAL}" in archive else None,
        dinov2=of_dinov2,
    )


def load_moments(archive: Archive, network: Network) -> Moments:
    """Mean and covariance alone. Raises ``UserError`` where they are of another network."""
    identity = _identity(read_about(archive), "network")
    if identity is None and network.name != INCEPTION:
        raise UserError(
            f"{archive.where} does not say which network its statistics are of, so they count as "
            f"Inception's and do not go with --network '{network.name}': compute your own with "
            "--save-reference"
        )
    if identity is not None:
        _check_same(archive, identity, network.identity, "")
    return _moments(archive, "")


def _identity(about: dict[str, Any], key: str) -> dict[str, Any] | None:
    found = about.get(key)
    return found if isinstance(found, dict) else None


def _check_same(archive: Archive, theirs: dict[str, Any], ours: dict[str, Any], what: str) -> None:
    for key, value in ours.items():
        if theirs.get(key) != value:
            raise UserError(
                f"{archive.where} holds statistics of another {what}network: its {key} is "
                f"{str(theirs.get(key))[:80]}, here it is {str(value)[:80]}; take the same, or "
                "save the reference anew"
            )


def _moments(archive: Archive, end: str) -> Moments:
    names = (f"mu{end}", f"sigma{end}")
    (width,) = (archive.header(names[0]).shape or (0,))[:1]
    shapes = [archive.header(name).shape for name in names]
    kinds = {archive.header(name).dtype.kind for name in names}
    if kinds != {"f"} or shapes != [(width,), (width, width)] or not 0 < width <= MAX_WIDTH:
        raise UserError(
            f"{archive.where}: '{names[0]}' and '{names[1]}' are no mean (D,) and covariance "
            f"(D, D): they have shapes {shapes[0]} and {shapes[1]}"
        )
    arrays = [archive.array(name, 8 * MAX_WIDTH * MAX_WIDTH) for name in names]
    mean, covariance = (torch.from_numpy(array.astype(np.float64)) for array in arrays)
    if not (torch.isfinite(mean).all() and torch.isfinite(covariance).all()):
        raise UserError(f"{archive.where}: '{names[0]}' or '{names[1]}' is not finite")
    return Moments(mean, covariance)


def _features(archive: Archive, width: int, manifold: int) -> np.ndarray | None:
    if FEATURES not in archive:
        return None
    shape, dtype, *_ = archive.header(FEATURES)
    if dtype != np.float32 or len(shape) != 2 or shape[1] != width or shape[0] > MAX_FEATURES:
        raise UserError(
            f"{archive.where}: '{FEATURES}' is {dtype} {shape}; expected float32 (N, {width})"
        )
    spool = FeatureBuffer(shape[0], manifold)
    for block in archive.blocks(FEATURES, 1024):
        if not np.isfinite(block).all():
            raise UserError(f"{archive.where}: '{FEATURES}' is not finite")
        spool.add(torch.from_numpy(block))
    return spool.rows()
