"""The numbers of an evaluation from what was measured of samples and reference."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from pipeline.evaluate.features.base import Network
from pipeline.evaluate.frechet import HasMoments, frechet_distance
from pipeline.evaluate.measure import Measured
from pipeline.evaluate.precision_recall import precision_recall
from schemas.errors import UserError
from schemas.evaluate import Evaluation

PUBLISHED = 50_000
"""Samples of every published FID."""


def compare(
    samples: Measured,
    reference: Measured,
    network: Network,
    *,
    k: int = 3,
    device: torch.device | str = "cpu",
    say: Callable[[str], None],
) -> Evaluation:
    """``say`` takes what a person should know of the numbers, a line each. Raises ``UserError``."""
    fid = _distance("FID", samples.moments, reference.moments)
    sfid = fd_dinov2 = None
    if samples.spatial is not None and reference.spatial is not None:
        sfid = _distance("sFID", samples.spatial, reference.spatial)
    elif samples.spatial is not None:
        say("sfid is null: the reference's statistics have no mu_s and sigma_s")
    else:
        say("inception_score and sfid are null: they are defined on the Inception network alone")
    if samples.dinov2 is not None and reference.dinov2 is not None:
        fd_dinov2 = _distance("FD-DINOv2", samples.dinov2, reference.dinov2)
    elif samples.dinov2 is not None:
        say("fd_dinov2 is null: the reference's statistics have no DINOv2 moments")
    else:
        say("fd_dinov2 is null: give --dinov2-weights FILE, or hub to fetch them")
    precision = recall = None
    if samples.features is not None and reference.features is not None:
        for what, found in (("--samples", samples), ("--reference", reference)):
            if found.features is not None and len(found.features) <= k:
                raise UserError(
                    f"{what} has {len(found.features)} images, which have no {k} neighbours each: "
                    "give more, or a smaller --k"
                )
        precision, recall = precision_recall(
            samples.features, reference.features, k, device=device, quiet=False
        )
    else:
        say(
            "precision and recall are null: the reference has moments alone; a reference with "
            "images, or a file of --save-reference, gives them"
        )
    width = len(samples.moments.mean)
    if samples.count < PUBLISHED:
        singular = f", and {width} dimensions are more than samples" * (samples.count <= width)
        say(
            f"{samples.count} samples: Fréchet distances are biased upwards where there are few, "
            f"published ones are of {PUBLISHED}{singular}; compare equal numbers only"
        )
    return Evaluation(
        fid=fid,
        sfid=sfid,
        inception_score=samples.inception_score,
        precision=precision,
        recall=recall,
        fd_dinov2=fd_dinov2,
        samples=samples.count,
        network=network.name,
    )


def _distance(name: str, a: HasMoments, b: HasMoments) -> float:
    try:
        distance = frechet_distance(a, b)
    except (ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{name} cannot be computed: {reason}") from None
    if not math.isfinite(distance):
        raise UserError(f"{name} is not finite: the features' numbers are beyond all bounds")
    return distance
