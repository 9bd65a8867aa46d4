"""One evaluation: networks, reference and samples as the options say."""

from __future__ import annotations

import sys
from collections.abc import Callable

from pipeline.evaluate.features.base import Network
from pipeline.evaluate.features.factory import open_network
from pipeline.evaluate.features.timm_network import FeatureNetwork
from pipeline.evaluate.images.sources import IMAGES, Images, open_images
from pipeline.evaluate.measure import Measured, measure
from pipeline.evaluate.metrics import compare
from pipeline.evaluate.record import SampleOrigin, recorded
from pipeline.evaluate.reference_statistics import (
    INCEPTION,
    has_points,
    has_statistics,
    load_statistics,
    save_statistics,
)
from pipeline.runs.evaluations import check_run, record_evaluation
from pipeline.storage.files import redact
from pipeline.storage.npz import Archive
from schemas.errors import UserError
from schemas.evaluate import EvaluateConfig, Evaluation
from schemas.sample import SampleAbout, Weights

WEIGHTS: Weights = "ema"
"""Of samples that do not say."""

CheckOrigin = Callable[[str, SampleAbout, int], None]
"""Of a run's folder or URL, what samples say, and the step: raises ``UserError`` where they are
not of that run."""


def evaluate(
    config: EvaluateConfig, device: str, *, check_origin: CheckOrigin | None = None
) -> Evaluation | None:
    """Compare ``config.samples`` with ``config.reference``; None where there are no samples and
    only the reference's statistics are written. ``check_origin`` looks at samples that say what
    they are before ``config.record`` gets a row of them. Raises ``UserError``."""
    place = _check(config)
    samples = None
    if config.samples is not None:
        points = not place.endswith(".npz") or has_points(Archive(place, "--reference"))
        samples = _open(config, config.samples, "--samples", device, neighbours=points)
    run, origin = config.record, None
    if run is not None and samples is not None:  # before the hours of work that it would lose
        check_run(run)
        origin = _origin(config, samples.about)
        if samples.about is not None and check_origin is not None:
            check_origin(run, samples.about, origin.step)
    network, dinov2 = _networks(config, device)
    reference = _reference(config, place, network, dinov2, device)
    if config.save_reference is not None:
        save_statistics(config.save_reference, reference, network, dinov2)
        _say(f"statistics written to {redact(config.save_reference)}")
    if samples is None:
        return None
    measured = _measure(config, samples, "--samples", network, dinov2)
    found = compare(measured, reference, network, k=config.k, device=device, say=_say)
    if run is not None and origin is not None:
        record_evaluation(run, recorded(found, origin, network, reference.moments, place))
    return found


def _say(line: str) -> None:
    print(line, file=sys.stderr)


def _check(config: EvaluateConfig) -> str:
    """That options go together; the reference."""
    if config.reference is None:
        raise UserError("--reference is missing: an .npz, a folder of pictures or a store")
    if config.samples is None and config.save_reference is None:
        raise UserError("--samples is missing: an .npz, a folder of pictures or a store")
    if config.record is not None and config.samples is None:
        raise UserError("--record writes down an evaluation, which takes --samples")
    if config.save_reference is not None and not config.save_reference.endswith(".npz"):
        raise UserError(f"--save-reference '{config.save_reference}' must end in .npz")
    if config.network is None:
        for option in ("network_weights", "network_size", "network_args"):
            if getattr(config, option):
                dashed = option.replace("_", "-")
                raise UserError(f"--{dashed} goes with --network ID, which is missing")
    elif config.network_weights is None:
        raise UserError(
            f"--network-weights is missing: FILE, hub or random for --network {config.network}"
        )
    elif config.inception_weights is not None:
        raise UserError("--network and --inception-weights: fid is of one of them, choose")
    return config.reference


def _networks(config: EvaluateConfig, device: str) -> tuple[Network, FeatureNetwork | None]:
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
    return open_network(config, device=device), dinov2


def _open(
    config: EvaluateConfig, place: str, option: str, device: str, *, neighbours: bool
) -> Images:
    """``neighbours``: whether each image needs ``config.k`` of them."""
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
            f"{option} has {images.count} images: a covariance takes 2, and says something from "
            "some thousands on"
        )
    if neighbours and min(images.count, config.manifold_images) <= config.k:
        raise UserError(
            f"{option} has {images.count} images, which have no {config.k} neighbours each: give "
            "more (and --manifold-images), or a smaller --k"
        )
    return images


def _measure(
    config: EvaluateConfig,
    images: Images,
    option: str,
    network: Network,
    dinov2: FeatureNetwork | None,
) -> Measured:
    return measure(
        images,
        network,
        dinov2,
        option=option,
        batch_size=config.batch_size,
        manifold=config.manifold_images,
    )


def _reference(
    config: EvaluateConfig,
    place: str,
    network: Network,
    dinov2: FeatureNetwork | None,
    device: str,
) -> Measured:
    """From images, from statistics, or where a file has both the moments from its statistics and
    the rest from its images."""
    stated = None
    if place.endswith(".npz"):
        archive = Archive(place, "--reference")
        # statistics without a word on their network are Inception's; images serve any
        theirs = network.name == INCEPTION or IMAGES not in archive
        if has_statistics(archive) and theirs:
            stated = load_statistics(archive, network, dinov2, config.manifold_images)
            if IMAGES not in archive:
                return stated
    compared = config.samples is not None
    images = _open(config, place, "--reference", device, neighbours=compared)
    found = _measure(config, images, "--reference", network, dinov2)
    if stated is not None:
        found.moments, found.kind = stated.moments, stated.kind
        found.spatial = stated.spatial or found.spatial
        _say(
            "fid and sfid are against the statistics in --reference, which may be of more images "
            f"than the {images.count} beside them; precision, recall and fd_dinov2 are against "
            "those images alone"
        )
    return found


def _origin(config: EvaluateConfig, about: SampleAbout | None) -> SampleOrigin:
    """For the row of ``--record``: as samples say, else the options."""
    step, weights = config.step, config.weights
    if about is not None:
        for option, asked, said in (
            ("--step", step, about.step),
            ("--weights", weights, about.weights),
        ):
            if None not in (asked, said) and asked != said:
                raise UserError(f"{option} {asked}: the samples say {said}; leave the option out")
        step = about.step if step is None else step
        weights = about.weights
    if step is None:
        raise UserError(
            "--record needs the step that the samples are of, which they do not say: give --step N"
        )
    return SampleOrigin(
        step=step,
        weights=weights or WEIGHTS,
        weights_sha256=None if about is None else about.weights_sha256,
        sampling=None if about is None else about.sampling,
        decoder=None if about is None else about.autoencoder,
    )
