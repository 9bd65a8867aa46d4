"""Evaluations beside the run whose samples they are of."""

from __future__ import annotations

import json
from dataclasses import dataclass

from pipeline.evaluate.features.base import Network
from pipeline.evaluate.frechet import Moments
from pipeline.hashing import sha256_of_arrays
from pipeline.storage.files import redact
from schemas.evaluate import Evaluation, NetworkIdentity, RecordedEvaluation
from schemas.fields import DIGEST, text_or_digest
from schemas.sample import Sampling, Weights


@dataclass(frozen=True)
class SampleOrigin:
    """Where samples come from."""

    step: int
    weights: Weights
    weights_sha256: str | None
    """Of the student's, all of it; None where samples do not say."""
    sampling: Sampling | None
    """None where they do not say."""
    decoder: str | None
    """Name of the autoencoder."""


def recorded(
    numbers: Evaluation, origin: SampleOrigin, network: Network, reference: Moments, place: str
) -> RecordedEvaluation:
    """The row of ``numbers``, of samples against the ``reference`` at ``place``."""
    decoder = origin.decoder
    return RecordedEvaluation(
        **numbers.model_dump(),
        step=origin.step,
        weights=origin.weights,
        weights_sha256=None if origin.weights_sha256 is None else origin.weights_sha256[:DIGEST],
        network_identity=_identity(network),
        reference=redact(place),
        reference_sha256=digest_of(reference),
        sampling=origin.sampling,
        decoder=None if decoder is None else redact(decoder),
    )


def _identity(network: Network) -> NetworkIdentity:
    said = network.identity
    arguments = said.get("arguments") or {}
    return NetworkIdentity(
        size=said["size"],
        weights_sha256=said["weights_sha256"][:DIGEST],
        arguments=text_or_digest(json.dumps(arguments, sort_keys=True)) if arguments else "",
    )


def digest_of(moments: Moments) -> str:
    """What rows say of a reference: a digest of the numbers of a file of --save-reference."""
    parts = {"mu": moments.mean, "sigma": moments.covariance}
    whole = sha256_of_arrays((name, part.cpu().numpy()) for name, part in parts.items())
    return whole[:DIGEST]
