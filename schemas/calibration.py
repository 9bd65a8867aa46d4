"""Schemas of the measurement that chose the steps of a stream's codecs."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from schemas.base import Strict
from schemas.codecs import CalibratedSet, CodecName, Promise
from schemas.fields import Finite, Name, Seed, is_none
from schemas.networks import MAX_DEPTH


class TargetErrors(Strict):
    """Mean errors of targets."""

    kl: Finite | None
    """KL divergence of attention rows in nats; None without layers."""
    feature_cosine: Finite
    """Cosine of the features of a token."""
    gradient_cosine: Finite
    """Cosine of the gradients of the alignment losses on a random student."""

    def keep(self, promise: Promise) -> bool:
        return (
            (self.kl or 0.0) <= promise.kl
            and self.feature_cosine >= promise.feature_cosine
            and self.gradient_cosine >= promise.gradient_cosine
        )


class CalibrationPoint(Strict):
    """Mean errors with one step."""

    codec: CodecName
    kl: Finite | None = Field(default=None, exclude_if=is_none)
    """KL divergence of attention rows in nats: of the layer, or of all that the column serves."""
    feature_cosine: Finite | None = Field(default=None, exclude_if=is_none)
    share: Finite
    """Largest error, with its sampling error, as a share of what the promise allows: at most
    1 - ``Calibration.margin`` for a step that keeps it."""


class CalibrationCurve(Strict):
    """Errors by step of one column, or of one layer of one or two columns, and the choice."""

    columns: Annotated[tuple[Name, ...], Field(min_length=1, max_length=2)]
    """Columns that share the step: tokens, features, attention, or query and key."""
    layer: Annotated[int, Field(ge=0, le=MAX_DEPTH)] | None = Field(
        default=None, exclude_if=is_none
    )
    """Teacher layer, 0-based; None for a column that is not of layers."""
    codec: CodecName
    """Codec with the chosen levels."""
    points: Annotated[tuple[CalibrationPoint, ...], Field(max_length=64)]
    """By rising levels."""


class Calibration(Strict):
    """Measurement that chose the steps of a stream's codecs, before its first shard was written.

    The reference are the teacher's targets in the precision of the extraction, without a codec.
    """

    codec: CalibratedSet
    promise: Promise
    margin: Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]
    """Share of the promise that was kept free, beside two standard errors of each mean."""
    seed: Seed
    """Seed of the choice of images."""
    images: Annotated[int, Field(ge=1)]
    """Number of images that were to be measured."""
    keys: tuple[str, ...]
    """Keys of those that could be read."""
    curves: tuple[CalibrationCurve, ...]
    errors: TargetErrors
    """Errors with the chosen steps."""
    arithmetic: TargetErrors | None = Field(default=None, exclude_if=is_none)
    """Errors of the extraction's arithmetic alone, against float32; None for float32."""

    @property
    def columns(self) -> set[str]:
        """Columns whose steps it chose."""
        return {column for curve in self.curves for column in curve.columns}
