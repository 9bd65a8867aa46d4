"""Metrics of an evaluation from the measurements of samples and reference, and the row that records
them in a run."""

from __future__ import annotations

import json
import logging
import math
from dataclasses import dataclass

import torch

from pipeline.evaluate.features.base import Network
from pipeline.evaluate.frechet import HasMoments, Moments, frechet_distance
from pipeline.evaluate.measure import Measurements
from pipeline.evaluate.precision_recall import precision_recall
from pipeline.evaluate.reference_statistics import moments_digest
from pipeline.storage.files import redact
from schemas.errors import UserError, plain_text
from schemas.evaluate import Evaluation, NetworkIdentity, RecordedEvaluation
from schemas.fields import DIGEST, text_or_digest
from schemas.sample import Sampling, Weights

logger = logging.getLogger(__name__)

PUBLISHED_SAMPLES = 50_000
"""Number of samples in published FIDs."""
RESIZINGS = {
    "tensorflow": "fid is with TensorFlow's resizing to Inception's 299 pixels, as ADM's; the "
    "numbers on MS-COCO of U-ViT, REPA and HASTE are with PyTorch's: --inception-resizing pytorch "
    "or both",
    "pytorch": "fid is with PyTorch's resizing to Inception's 299 pixels, as pytorch-fid's and the "
    "numbers on MS-COCO of U-ViT, REPA and HASTE; it differs from TensorFlow's, as ADM's",
}


@dataclass(frozen=True)
class SampleOrigin:
    """Checkpoint and sampling method of samples."""

    step: int
    weights: Weights
    weights_sha256: str | None
    """Full SHA-256 of the student's weights; None where the samples have no description."""
    sampling: Sampling | None
    """None where the samples have no description."""
    decoder: str | None
    """Name of the autoencoder."""


def compare(
    samples: Measurements,
    reference: Measurements,
    network: Network,
    *,
    k: int = 3,
    device: torch.device | str = "cpu",
) -> Evaluation:
    """Distances and scores of ``samples`` against ``reference``; those that the measurements do not
    allow are None and logged. Raises ``UserError``."""
    fid = _distance("FID", samples.moments, reference.moments)
    precision, recall = _precision_recall(samples, reference, k, device)
    evaluation = Evaluation(
        fid=fid,
        fid_pytorch=_optional_distance("FID", samples.resized, reference.resized),
        inception_resizing=network.identity.get("resizing"),
        sfid=_optional_distance("sFID", samples.spatial, reference.spatial),
        inception_score=samples.inception_score,
        precision=precision,
        recall=recall,
        fd_dinov2=_optional_distance("FD-DINOv2", samples.dinov2, reference.dinov2),
        clip_score=samples.clip_score,
        clip=samples.clip,
        samples=samples.count,
        network=network.name,
    )
    _log_limits(samples, evaluation)
    return evaluation


def evaluation_row(
    numbers: Evaluation, origin: SampleOrigin, network: Network, reference: Moments, place: str
) -> RecordedEvaluation:
    """The row of a run's ``evaluations.jsonl`` for ``numbers`` against the ``reference`` at
    ``place``."""
    decoder = origin.decoder
    return RecordedEvaluation(
        **numbers.model_dump(),
        step=origin.step,
        weights=origin.weights,
        weights_sha256=None if origin.weights_sha256 is None else origin.weights_sha256[:DIGEST],
        network_identity=_network_identity(network),
        reference=redact(place),
        reference_sha256=moments_digest(reference),
        sampling=origin.sampling,
        decoder=None if decoder is None else redact(decoder),
    )


def _precision_recall(
    samples: Measurements, reference: Measurements, k: int, device: torch.device | str
) -> tuple[float, float] | tuple[None, None]:
    if samples.features is None or reference.features is None:
        return None, None
    for option, features in (("--samples", samples.features), ("--reference", reference.features)):
        if len(features) <= k:
            raise UserError(
                f"{option} has {len(features)} images, too few for {k} neighbours each: give more, "
                "or a smaller --k"
            )
    return precision_recall(samples.features, reference.features, k, device=device)


def _optional_distance(name: str, a: HasMoments | None, b: HasMoments | None) -> float | None:
    return None if a is None or b is None else _distance(name, a, b)


def _distance(name: str, a: HasMoments, b: HasMoments) -> float:
    try:
        distance = frechet_distance(a, b)
    except (ValueError, RuntimeError) as error:
        raise UserError(f"{name} cannot be computed: {plain_text(str(error))[:200]}") from None
    if not math.isfinite(distance):
        raise UserError(f"{name} is not finite: the features are too large for float64")
    return distance


def _log_limits(samples: Measurements, evaluation: Evaluation) -> None:
    """Log the reasons of null metrics, and a number of samples below that of published FIDs."""
    if samples.spatial is None:
        logger.info("inception_score and sfid are null: only the Inception network defines them")
    elif evaluation.sfid is None:
        logger.info("sfid is null: the reference's statistics have no mu_s and sigma_s")
    if samples.dinov2 is None:
        logger.info("fd_dinov2 is null: give --dinov2-weights FILE, or hub to download them")
    elif evaluation.fd_dinov2 is None:
        logger.info("fd_dinov2 is null: the reference's statistics have no DINOv2 moments")
    if evaluation.inception_resizing is not None:
        logger.info(RESIZINGS[evaluation.inception_resizing])
    if evaluation.fid_pytorch is not None:
        difference = evaluation.fid_pytorch - evaluation.fid
        logger.info("PyTorch's resizing changes the FID by %+.4f", difference)
    elif samples.resized is not None:
        logger.info(
            "fid_pytorch is null: the reference's statistics are of one resizing; use one with "
            "images, or --save-reference with --inception-resizing both"
        )
    if evaluation.precision is None:
        logger.info(
            "precision and recall are null: the reference has only moments; use a reference with "
            "images, or a file written by --save-reference"
        )
    width = len(samples.moments.mean)
    if samples.count < PUBLISHED_SAMPLES:
        singular = f", and fewer than the {width} dimensions make the covariance singular"
        logger.warning(
            "%d samples: few samples bias Fréchet distances upwards (published ones use %d)%s; "
            "compare only distances with equal numbers of samples",
            samples.count,
            PUBLISHED_SAMPLES,
            singular if samples.count <= width else "",
        )


def _network_identity(network: Network) -> NetworkIdentity:
    identity = network.identity
    arguments = identity.get("arguments") or {}
    return NetworkIdentity(
        size=identity["size"],
        resizing=identity.get("resizing", "tensorflow"),
        weights_sha256=identity["weights_sha256"][:DIGEST],
        arguments=text_or_digest(json.dumps(arguments, sort_keys=True)) if arguments else "",
    )
