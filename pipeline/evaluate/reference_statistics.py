"""Statistics of a reference in ADM's format: an .npz with mu, sigma, mu_s, sigma_s.

Files of this project also hold features (for precision and recall), DINOv2's moments, and in
``about`` the identity of the networks. ADM's files do not name a network; it is Inception.
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
from pipeline.evaluate.measure import FeatureBuffer, Measurements
from pipeline.hashing import sha256_of_arrays
from pipeline.storage.files import open_url, publish
from pipeline.storage.npz import ABOUT, Archive, read_about
from schemas.errors import UserError
from schemas.fields import DIGEST

VERSION = 1
INCEPTION = "inception-v3"
SPATIAL, DINOV2, RESIZED = "_s", "_dinov2", "_pytorch"
"""Suffixes of the names of spatial moments, of DINOv2's, and of Inception's with PyTorch's resizing
beside those with TensorFlow's."""
FEATURES = "features"
DEFAULTS = {"resizing": "tensorflow"}
"""Identity of networks whose files do not say it."""
MAX_WIDTH = 1 << 13
MAX_FEATURES = 1 << 20


def has_statistics(archive: Archive) -> bool:
    """True where the file has moments."""
    return "mu" in archive and "sigma" in archive


def has_points(archive: Archive) -> bool:
    """True where the file has images or features, which precision and recall need."""
    return IMAGES in archive or FEATURES in archive


def save_statistics(
    place: str, measured: Measurements, network: Network, dinov2: FeatureNetwork | None
) -> None:
    """Write the measurements of a reference, atomically. Raises ``UserError``."""
    info = {
        "version": VERSION,
        "samples": measured.count,
        "images": measured.kind,
        "network": network.identity,
        "dinov2": None if dinov2 is None else dinov2.identity,
    }
    arrays: dict[str, np.ndarray] = {ABOUT: np.array(json.dumps(info))}
    by_suffix = {"": measured.moments, SPATIAL: measured.spatial, DINOV2: measured.dinov2}
    by_suffix[RESIZED] = measured.resized
    for suffix, moments in by_suffix.items():
        if moments is not None:
            arrays[f"mu{suffix}"] = moments.mean.cpu().numpy()
            arrays[f"sigma{suffix}"] = moments.covariance.cpu().numpy()
    if measured.features is not None:
        arrays[FEATURES] = measured.features
    filesystem, path = open_url(place, what="--save-reference")
    try:
        with tempfile.TemporaryDirectory() as folder:
            local = Path(folder) / "statistics.npz"
            with zipfile.ZipFile(local, "w", allowZip64=True) as zipped:
                for name, array in arrays.items():  # one by one, because features are a memory map
                    with zipped.open(f"{name}.npy", "w", force_zip64=True) as member:
                        np.lib.format.write_array(member, array, allow_pickle=False)
            publish(filesystem, local, path)
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"--save-reference '{place}' cannot be written: {error}") from None


def load_statistics(
    archive: Archive, network: Network, dinov2: FeatureNetwork | None, max_features: int
) -> Measurements:
    """Measurements in a file, with at most ``max_features`` features. Raises ``UserError`` where
    they are of another network, naming the difference."""
    info = read_about(archive)
    moments = load_moments(archive, network)
    dinov2_moments = None
    if dinov2 is not None and f"mu{DINOV2}" in archive:
        identity = _identity(info, "dinov2")
        if identity is not None:
            _check_same(archive, identity, dinov2.identity, "DINOv2 ")
            dinov2_moments = _moments(archive, DINOV2)
    samples = info.get("samples")
    return Measurements(
        count=samples if type(samples) is int else 0,
        kind=str(info.get("images") or "statistics in ADM's format"),
        moments=moments,
        features=_features(archive, len(moments.mean), max_features),
        spatial=_moments(archive, SPATIAL) if f"mu{SPATIAL}" in archive else None,
        dinov2=dinov2_moments,
        resized=_moments(archive, RESIZED) if f"mu{RESIZED}" in archive else None,
    )


def load_moments(archive: Archive, network: Network) -> Moments:
    """Moments of the network's features. Raises ``UserError`` where they are of another network."""
    identity = _identity(read_about(archive), "network")
    if identity is None and network.name != INCEPTION:
        raise UserError(
            f"{archive.where} does not name the network of its statistics, so they count as "
            f"Inception's and cannot be used with --network '{network.name}': compute statistics "
            "with --save-reference"
        )
    if identity is not None:
        _check_same(archive, identity, network.identity, "")
    return _moments(archive, "")


def moments_digest(moments: Moments) -> str:
    """Short digest of moments, which identifies a reference in recorded evaluations."""
    arrays = {"mu": moments.mean, "sigma": moments.covariance}
    digest = sha256_of_arrays((name, array.cpu().numpy()) for name, array in arrays.items())
    return digest[:DIGEST]


def _identity(info: dict[str, Any], key: str) -> dict[str, Any] | None:
    identity = info.get(key)
    return identity if isinstance(identity, dict) else None


def _check_same(
    archive: Archive, stored: dict[str, Any], current: dict[str, Any], prefix: str
) -> None:
    one, other = DEFAULTS | stored, DEFAULTS | current
    for key, value in other.items():
        if one.get(key) != value:
            raise UserError(
                f"{archive.where} holds statistics of another {prefix}network: its {key} is "
                f"{str(one.get(key))[:80]}, here it is {str(value)[:80]}; use the same network, "
                "or save the reference again"
            )


def _moments(archive: Archive, suffix: str) -> Moments:
    names = (f"mu{suffix}", f"sigma{suffix}")
    (width,) = (archive.header(names[0]).shape or (0,))[:1]
    shapes = [archive.header(name).shape for name in names]
    kinds = {archive.header(name).dtype.kind for name in names}
    if kinds != {"f"} or shapes != [(width,), (width, width)] or not 0 < width <= MAX_WIDTH:
        raise UserError(
            f"{archive.where}: '{names[0]}' and '{names[1]}' have shapes {shapes[0]} and "
            f"{shapes[1]}; expected a mean (D,) and a covariance (D, D) of floats, D at most "
            f"{MAX_WIDTH}"
        )
    arrays = [archive.array(name, 8 * MAX_WIDTH * MAX_WIDTH) for name in names]
    mean, covariance = (torch.from_numpy(array.astype(np.float64)) for array in arrays)
    if not (torch.isfinite(mean).all() and torch.isfinite(covariance).all()):
        raise UserError(f"{archive.where}: '{names[0]}' or '{names[1]}' is not finite")
    return Moments(mean, covariance)


def _features(archive: Archive, width: int, max_features: int) -> np.ndarray | None:
    if FEATURES not in archive:
        return None
    shape, dtype, *_ = archive.header(FEATURES)
    if dtype != np.float32 or len(shape) != 2 or shape[1] != width or shape[0] > MAX_FEATURES:
        raise UserError(
            f"{archive.where}: '{FEATURES}' is {dtype} {shape}; expected float32 (N, {width}), N "
            f"at most {MAX_FEATURES}"
        )
    buffer = FeatureBuffer(shape[0], max_features)
    for block in archive.blocks(FEATURES, 1024):
        if not np.isfinite(block).all():
            raise UserError(f"{archive.where}: '{FEATURES}' is not finite")
        buffer.add(torch.from_numpy(block))
    return buffer.rows()
