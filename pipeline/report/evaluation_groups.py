"""Which evaluations can stand on one line, and what to call them."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any, TypeVar

from pydantic import ValidationError

from pipeline.runs.reader import Row
from schemas.base import Strict
from schemas.evaluate import NetworkIdentity
from schemas.fields import text_or_digest
from schemas.sample import Sampling

SHORT = 8
"""Digits of a digest that a person sees."""

Model = TypeVar("Model", bound=Strict)


@dataclass(frozen=True)
class Kind:
    """What evaluations have in common whose numbers can be compared. What a row of an earlier
    version does not say is None, and goes with its like."""

    network: str
    identity: NetworkIdentity | str | None
    """A text where it is nothing that this version knows."""
    samples: int | None
    reference: str
    """A digest of its statistics; of an earlier row its path."""
    sampling: Sampling | str | None
    place: str = field(compare=False)
    """Where the reference lay: equal statistics may lie anywhere."""
    decoder: str = field(compare=False)
    """What the autoencoder was called."""


def comparable(row: Row) -> Kind:
    """The kind of an evaluation's row, whatever somebody wrote into it."""
    samples = row.get("samples")
    place = str(row.get("reference") or "")
    digest = row.get("reference_sha256")
    return Kind(
        network=str(row.get("network") or ""),
        identity=_parsed(NetworkIdentity, row.get("network_identity")),
        samples=samples if isinstance(samples, int) and abs(samples) < 1 << 53 else None,
        reference=place if digest is None else str(digest),
        sampling=_parsed(Sampling, row.get("sampling")),
        place=place,
        decoder=str(row.get("decoder") or ""),
    )


def describe_kind(kind: Kind) -> list[str]:
    """The same in words."""
    count = "unknown number of samples" if kind.samples is None else f"{kind.samples:,} samples"
    parts = [_describe_network(kind), count]
    if kind.place or kind.reference:
        same = kind.reference == kind.place
        digest = "" if same else f" ({kind.reference[:SHORT]})"
        parts.append(f"against {kind.place}{digest}")
    if isinstance(kind.sampling, Sampling):
        parts += _describe_sampling(kind.sampling, kind.decoder)
    elif kind.sampling is not None:
        parts.append(f"drawn by {kind.sampling}")
    return parts


def _parsed(model: type[Model], value: Any) -> Model | str | None:
    if value is None:
        return None
    try:
        return model.model_validate(value)
    except (ValidationError, RecursionError):
        pass
    try:
        return text_or_digest(json.dumps(value, sort_keys=True))
    except RecursionError:
        return "what cannot be read"


def _describe_network(kind: Kind) -> str:
    name, identity = kind.network or "unknown network", kind.identity
    if identity is None:
        return name
    if isinstance(identity, str):
        return f"{name} ({identity})"
    arguments = f", {identity.arguments}" if identity.arguments else ""
    return f"{name} ({identity.size} px, weights {identity.weights_sha256[:SHORT]}{arguments})"


def _describe_sampling(sampling: Sampling, decoder: str) -> list[str]:
    sampler = sampling.sampler
    parts = [f"{sampler.method} of {sampler.steps} steps"]
    if sampler.guidance == 1:
        parts.append("no guidance")
    else:
        interval = f"[{sampler.guidance_low:g}, {sampler.guidance_high:g}]"
        parts.append(f"guidance {sampler.guidance:g} at t in {interval}")
    parts += [f"seed {sampler.seed}", f"{sampling.labels} labels of classes {sampling.classes}"]
    digest = f"({sampling.decoder_sha256[:SHORT]})"
    parts.append(f"decoder {decoder} {digest}" if decoder else f"decoder {digest}")
    return [*parts, sampling.precision]
