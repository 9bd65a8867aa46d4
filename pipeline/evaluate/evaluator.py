"""One evaluation: opens the networks, the reference and the samples that the options name."""

from __future__ import annotations

import logging
from typing import NamedTuple

from pipeline.evaluate.features.base import Network
from pipeline.evaluate.features.clip import ClipScore, open_clip_score
from pipeline.evaluate.features.factory import open_network
from pipeline.evaluate.features.timm_network import FeatureNetwork
from pipeline.evaluate.images.sources import IMAGES, Images, open_images
from pipeline.evaluate.measure import Measurements, measure
from pipeline.evaluate.metrics import SampleOrigin, compare, evaluation_row
from pipeline.evaluate.options import check_options
from pipeline.evaluate.reference_statistics import (
    INCEPTION,
    has_points,
    has_statistics,
    load_statistics,
    save_statistics,
)
from pipeline.runs.evaluations import check_run, record_evaluation
from pipeline.runs.provenance import check_samples_are_of
from pipeline.storage.files import redact
from pipeline.storage.npz import Archive
from schemas.errors import UserError
from schemas.evaluate import EvaluateConfig, Evaluation, Resizing
from schemas.sample import SampleAbout, Weights

logger = logging.getLogger(__name__)

DEFAULT_WEIGHTS: Weights = "ema"
"""Weights of samples without a description."""


def evaluate(config: EvaluateConfig, device: str) -> Evaluation | None:
    """Compare ``config.samples`` with ``config.reference``, and add a row to the run
    ``config.record``. None without samples: only the reference's statistics are written. Raises
    ``UserError``, also where the samples' description says that they are of another run."""
    place = check_options(config)
    samples = None
    if config.samples is not None:
        has_features = not place.endswith(".npz") or has_points(Archive(place, "--reference"))
        samples = _open(config, config.samples, "--samples", device, need_neighbours=has_features)
    run, origin = config.record, None
    if run is not None and samples is not None:  # a failure comes before hours of work
        check_run(run)
        origin = _origin(config, samples.info)
        if samples.info is not None:
            check_samples_are_of(run, samples.info, origin.step)
    networks = _open_networks(config, device)
    network, dinov2, _ = networks
    clip = None
    if samples is not None and config.clip_weights is not None:
        clip = open_clip_score(config, samples, device)
    reference = _measure_reference(config, place, networks, device)
    if config.save_reference is not None:
        save_statistics(config.save_reference, reference, network, dinov2)
        logger.info("statistics written to %s", redact(config.save_reference))
    if samples is None:
        return None
    measured = _measure(config, samples, "--samples", networks, clip)
    numbers = compare(measured, reference, network, k=config.k, device=device)
    if run is not None and origin is not None:
        row = evaluation_row(numbers, origin, network, reference.moments, place)
        record_evaluation(run, row)
    return numbers


class Networks(NamedTuple):
    """The networks of an evaluation."""

    network: Network
    dinov2: FeatureNetwork | None
    resized: Network | None
    """Inception with PyTorch's resizing, beside ``network``."""


def _open_networks(config: EvaluateConfig, device: str) -> Networks:
    dinov2 = None
    if config.dinov2_weights is not None:
        dinov2 = FeatureNetwork(
            config.dinov2,
            config.dinov2_weights,
            size=config.dinov2_size,
            seed=config.seed,
            device=device,
            option="--dinov2",
        )
    both = config.inception_resizing == "both"
    resizing: Resizing = "pytorch" if config.inception_resizing == "pytorch" else "tensorflow"
    return Networks(
        open_network(config, device=device, resizing=resizing),
        dinov2,
        open_network(config, device=device, resizing="pytorch") if both else None,
    )


def _open(
    config: EvaluateConfig, place: str, option: str, device: str, *, need_neighbours: bool
) -> Images:
    """Images at ``place``. Raises ``UserError`` for fewer than 2, and with ``need_neighbours`` for
    at most ``config.k``."""
    images = open_images(
        place,
        option,
        limit=config.max_images,
        resolution=config.resolution,
        autoencoder=config.autoencoder,
        device=device,
    )
    if images.count < 2:
        raise UserError(
            f"{option} has {images.count} images: a covariance needs at least 2, and thousands to "
            "be meaningful"
        )
    if need_neighbours and min(images.count, config.manifold_images) <= config.k:
        raise UserError(
            f"{option} has {images.count} images, too few for {config.k} neighbours each: give "
            "more (and --manifold-images), or a smaller --k"
        )
    return images


def _measure(
    config: EvaluateConfig,
    images: Images,
    option: str,
    networks: Networks,
    clip: ClipScore | None = None,
) -> Measurements:
    return measure(
        images,
        networks.network,
        networks.dinov2,
        option=option,
        batch_size=config.batch_size,
        max_features=config.manifold_images,
        resized=networks.resized,
        clip=clip,
    )


def _measure_reference(
    config: EvaluateConfig,
    place: str,
    networks: Networks,
    device: str,
) -> Measurements:
    """Measurements of the reference: from its statistics, from its images, or where a file has
    both, moments from the statistics and the rest from the images."""
    statistics = None
    network, dinov2, _ = networks
    if place.endswith(".npz"):
        archive = Archive(place, "--reference")
        # statistics that do not name their network are Inception's; images suit any network
        usable = network.name == INCEPTION or IMAGES not in archive
        if has_statistics(archive) and usable:
            statistics = load_statistics(archive, network, dinov2, config.manifold_images)
            if IMAGES not in archive:
                return statistics
    compared = config.samples is not None
    images = _open(config, place, "--reference", device, need_neighbours=compared)
    measured = _measure(config, images, "--reference", networks)
    if statistics is not None:
        measured.resized = statistics.resized
        measured.moments, measured.kind = statistics.moments, statistics.kind
        measured.spatial = statistics.spatial or measured.spatial
        logger.warning(
            "fid and sfid use the statistics in --reference, which may describe more images than "
            "the %d images in the same file; precision, recall and fd_dinov2 use those images only",
            images.count,
        )
    return measured


def _origin(config: EvaluateConfig, info: SampleAbout | None) -> SampleOrigin:
    """Origin of the samples: from their description, else from the options."""
    step, weights = config.step, config.weights
    if info is not None:
        for option, given, described in (
            ("--step", step, info.step),
            ("--weights", weights, info.weights),
        ):
            if None not in (given, described) and given != described:
                raise UserError(
                    f"{option} {given}: the samples are described as {described}; leave the "
                    "option out"
                )
        step = info.step if step is None else step
        weights = info.weights
    if step is None:
        raise UserError(
            "--record needs the training step of the samples, which have no description: give "
            "--step N"
        )
    return SampleOrigin(
        step=step,
        weights=weights or DEFAULT_WEIGHTS,
        weights_sha256=None if info is None else info.weights_sha256,
        sampling=None if info is None else info.sampling,
        decoder=None if info is None else info.autoencoder,
    )
