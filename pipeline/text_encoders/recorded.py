"""The text encoder that a store or a run names, for captions that are not in a store."""

from __future__ import annotations

import torch

from pipeline.text_encoders.encoder import TextEncoder
from schemas.errors import UserError
from schemas.extract import TextConfig
from schemas.fields import DIGEST
from schemas.networks import TextEncoderInfo
from schemas.sample import SampleTextConfig

SOURCE = "source"
"""Weights of embeddings that a data set contains: no encoder was run."""


def recorded_config(
    info: TextEncoderInfo, given: SampleTextConfig | None = None, *, tokens_only: bool = False
) -> TextConfig:
    """Options that load the encoder of ``info``, or with ``tokens_only`` its tokenizer; ``given``
    replaces places."""
    given = given or SampleTextConfig()
    recorded = "hub" if info.weights == SOURCE else info.weights
    return TextConfig(
        keep="tokens" if tokens_only else "embeddings",
        encoder=given.encoder or info.encoder,
        weights=given.weights or recorded,
        seed=info.seed,
        model_args=info.model_args,
        tokenizer=given.tokenizer or (None if info.weights == SOURCE else info.tokenizer),
        max_tokens=info.tokens,
    )


def open_recorded(
    info: TextEncoderInfo,
    given: SampleTextConfig | None = None,
    *,
    device: torch.device | str = "cpu",
) -> TextEncoder:
    """The encoder of ``info`` on ``device``. Raises ``UserError`` where it cannot be loaded, naming
    the options for its places, or where it is another one."""
    try:
        encoder = TextEncoder(recorded_config(info, given))
    except UserError as error:
        raise UserError(
            f"the captions' encoder, as recorded with the student's training data: {error}; "
            "jobs/sample.py finds it elsewhere by --text.encoder, --text.weights and "
            "--text.tokenizer"
        ) from None
    check_same_encoder(info, encoder.info(), "--text.encoder")
    return encoder.to(device)


def check_same_encoder(trained: TextEncoderInfo, other: TextEncoderInfo, what: str) -> None:
    """Raises ``UserError`` naming ``what`` where ``other`` is not the encoder ``trained`` that a
    student's captions had in training. Checksums that are not recorded are not compared."""
    for key in ("tokens", "width", "weights_sha256", "tokenizer_sha256"):
        one, two = getattr(trained, key), getattr(other, key)
        if one is not None and two is not None and one != two:
            shown = tuple(str(value)[:DIGEST] for value in (one, two))
            raise UserError(
                f"{what}: the student was trained on captions of '{trained.encoder}' with {key} "
                f"{shown[0]}; these are of '{other.encoder}' with {key} {shown[1]}"
            )
