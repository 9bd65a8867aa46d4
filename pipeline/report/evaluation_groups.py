"""Groups of evaluations whose numbers can be compared, and their names."""

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

DIGEST_DIGITS = 8
"""Digits of a digest that are shown."""

Model = TypeVar("Model", bound=Strict)


@dataclass(frozen=True)
class EvaluationGroup:
    """Common properties of evaluations whose numbers can be compared. A property that a row of an
    earlier version does not have is None: such rows form groups of their own."""

    network: str
    identity: NetworkIdentity | str | None
    """A text where this version cannot parse it."""
    samples: int | None
    reference: str
    """Digest of the reference's statistics; its path for a row of an earlier version."""
    sampling: Sampling | str | None
    path: str = field(compare=False)
    """Path of the reference, not compared because equal statistics may be stored anywhere."""
    decoder: str = field(compare=False)
    """Name of the autoencoder."""


def group_of(row: Row) -> EvaluationGroup:
    """The group of an evaluation's row, which may hold any JSON values."""
    samples = row.get("samples")
    path = str(row.get("reference") or "")
    digest = row.get("reference_sha256")
    return EvaluationGroup(
        network=str(row.get("network") or ""),
        identity=_parsed(NetworkIdentity, row.get("network_identity")),
        samples=samples if isinstance(samples, int) and abs(samples) < 1 << 53 else None,
        reference=path if digest is None else str(digest),
        sampling=_parsed(Sampling, row.get("sampling")),
        path=path,
        decoder=str(row.get("decoder") or ""),
    )


def describe_group(group: EvaluationGroup) -> str:
    """Its properties in words, separated by commas."""
    samples = "unknown number of" if group.samples is None else f"{group.samples:,}"
    parts = [_describe_network(group), f"{samples} samples"]
    if group.path or group.reference:
        digest = f" ({group.reference[:DIGEST_DIGITS]})" if group.reference != group.path else ""
        parts.append(f"against {group.path}{digest}")
    if isinstance(group.sampling, Sampling):
        parts += _describe_sampling(group.sampling, group.decoder)
    elif group.sampling is not None:
        parts.append(f"drawn by {group.sampling}")
    return ", ".join(parts)


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
        return "unreadable settings"


def _describe_network(group: EvaluationGroup) -> str:
    name, identity = group.network or "unknown network", group.identity
    if identity is None:
        return name
    if isinstance(identity, str):
        return f"{name} ({identity})"
    arguments = f", {identity.arguments}" if identity.arguments else ""
    digest = identity.weights_sha256[:DIGEST_DIGITS]
    return f"{name} ({identity.size} px, weights {digest}{arguments})"


def _describe_sampling(sampling: Sampling, decoder: str) -> list[str]:
    sampler = sampling.sampler
    interval = f"[{sampler.guidance_low:g}, {sampler.guidance_high:g}]"
    own = sampler.class_guidance
    of_class = "" if own is None else f" (class token {own:g})"
    digest = f"({sampling.decoder_sha256[:DIGEST_DIGITS]})"
    return [
        f"{sampler.method} of {sampler.steps} steps",
        "no guidance"
        if sampler.guidance == 1
        else f"guidance {sampler.guidance:g}{of_class} at t in {interval}",
        f"seed {sampler.seed}",
        f"{sampling.labels} labels of classes {sampling.classes}"
        if sampling.captions is None
        else f"captions {sampling.captions[:DIGEST_DIGITS]}",
        f"decoder {decoder} {digest}" if decoder else f"decoder {digest}",
        sampling.precision,
    ]
