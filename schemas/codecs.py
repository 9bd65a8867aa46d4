"""Names of codecs, of sets of codecs and of lossless compression."""

from __future__ import annotations

import re
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError

from schemas.base import Strict
from schemas.fields import Seed

_CODEC = (
    r"^(float32|float16|bfloat16|int64|uint8|int8(_group64|_outliers16|_centred)?|cbrt8"
    r"|(tokens|rms|heads|rice)[1-9][0-9]{0,2}|sqrt[1-9][0-9]{0,3})$"
)


def _codec_name(name: str) -> str:
    if re.fullmatch(_CODEC[1:-1], name) is None:
        raise PydanticCustomError(
            "codec_name",
            "'{name}' is not a codec: there are float32, float16, bfloat16, int64, uint8, int8, "
            "int8_group64, int8_outliers16, int8_centred and cbrt8; rice, tokens, rms and heads "
            "followed by 1 to 999 levels per RMS (rice28); sqrt followed by 1 to 9999 levels "
            "(sqrt510)",
            {"name": name[:60]},
        )
    return name


CodecName = Annotated[
    str, AfterValidator(_codec_name), WithJsonSchema({"type": "string", "pattern": _CODEC})
]
"""Name of a codec of ``pipeline.store.codecs``. A number after rice, tokens, rms or heads is its
levels per RMS, after sqrt its levels per unit."""

Lossless = Literal["none", "zstd", "blosc"]
"""'zstd' entropy-codes integers; 'blosc' shuffles bits first, for floats."""

CodecSet = Literal["faithful", "small", "int8", "bfloat16", "float16", "float32"]
"""A codec for each tensor of a cut, listed in ``pipeline.targets.cuts.CODEC_SETS``."""

CalibratedSet = Literal["faithful", "small"]
"""Codec sets whose steps a calibration chooses."""

Divergence = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Cosine = Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)]


class Promise(Strict):
    """Bounds of the mean errors of targets against the teacher in float32."""

    kl: Divergence
    """Largest KL divergence of attention rows, in nats."""
    feature_cosine: Cosine
    """Smallest cosine of the features of a token."""
    gradient_cosine: Cosine
    """Smallest cosine of the gradients of the alignment losses on a random student."""


PROMISES: dict[CalibratedSet, Promise] = {
    "faithful": Promise(kl=2e-4, feature_cosine=0.9999, gradient_cosine=0.9999),
    "small": Promise(kl=1e-3, feature_cosine=0.999, gradient_cosine=0.999),
}


class CodecOptions(Strict):
    """Codecs of the teacher's tensors, and the errors that they may have."""

    MAIN_KEY: ClassVar[str] = "name"
    """Key that ``--codec VALUE`` and ``codec: VALUE`` set."""

    name: CodecSet = "faithful"
    """Codecs of the teacher's tensors: 'faithful' (quantised with the coarsest steps that keep
    KL 2e-4 and cosines of 0.9999 on a calibration set, then entropy-coded), 'small' (likewise for
    1e-3 and 0.999: fewest bytes), 'int8' (scaled by the largest number of each token), 'bfloat16',
    'float16', 'float32'. tests/bench/RESULTS.md lists bytes and errors."""
    kl: Divergence | None = None
    """Largest mean KL divergence of attention rows, in nats, that faithful or small may cause.
    Default: 2e-4 for faithful, 1e-3 for small."""
    feature_cosine: Cosine | None = None
    """Smallest mean cosine of a token's features with the teacher's in float32. Default: 0.9999
    for faithful, 0.999 for small."""
    gradient_cosine: Cosine | None = None
    """Smallest cosine of the gradients of the alignment losses on a random student. Default: as
    the feature cosine."""
    calibration: Annotated[int, Field(ge=0, le=1 << 14)] = 256
    """Images that the teacher sees before the extraction, at most half of the data set, to choose
    the steps of faithful or small; the manifest holds steps and errors, and a store that exists
    keeps its steps. 0: the fixed steps of earlier versions, whose errors depend on the teacher.
    Single tensors have a fixed step by --column-codecs, for instance rice23."""
    seed: Seed = 0
    """Seed of the choice of these images."""

    @model_validator(mode="before")
    @classmethod
    def _by_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _targets_are_of_steps(self) -> CodecOptions:
        given = [key for key in Promise.model_fields if getattr(self, key) is not None]
        if given and self.name not in PROMISES:
            raise ValueError(
                f"{given[0]} is a target of 'faithful' and 'small', whose steps are chosen for it; "
                f"'{self.name}' has none: leave it out"
            )
        if given and not self.calibration:
            raise ValueError(
                f"{given[0]} needs a calibration, and calibration 0 takes fixed steps: leave one "
                "of them out"
            )
        return self

    def images(self, samples: int) -> int:
        """Images of the calibration of a data set: half of it at most, so that others can check
        it."""
        return min(self.calibration, max(1, samples // 2))

    @property
    def promise(self) -> Promise | None:
        """Bounds that a calibration keeps; None where steps are fixed."""
        if self.name not in PROMISES or not self.calibration:
            return None
        usual = PROMISES[self.name]
        cosine = self.feature_cosine or usual.feature_cosine
        return Promise(
            kl=self.kl or usual.kl,
            feature_cosine=cosine,
            gradient_cosine=self.gradient_cosine or cosine,
        )
