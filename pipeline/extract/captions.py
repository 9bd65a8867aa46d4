"""Captions of an extraction by its options and listing, without the networks that encode them."""

from __future__ import annotations

from pipeline.datasets import Listing
from pipeline.store.captions import pack_texts, text_columns
from schemas.errors import UserError
from schemas.extract import ExtractConfig
from schemas.fields import TEXT, is_text_stream
from schemas.networks import TextEncoderInfo, WeightsFile
from schemas.streams import ComputeInfo, TextStream


def text_stream_name(config: ExtractConfig) -> str:
    """Name of the stream of captions of an extraction."""
    return config.add_stream or TEXT


def adds_captions(config: ExtractConfig) -> bool:
    """True if the extraction adds only captions to a store."""
    return config.add_stream is not None and is_text_stream(config.add_stream)


def keeps_captions(config: ExtractConfig) -> bool:
    """True if the extraction writes a stream of captions."""
    return config.text.keep in ("embeddings", "tokens") and (
        config.add_stream is None or adds_captions(config)
    )


def with_captions(config: ExtractConfig, listing: Listing) -> ExtractConfig:
    """The options with ``text.keep``: embeddings by default, none where the data set has no
    captions. Raises ``UserError`` where it has none and captions are to be added."""
    if adds_captions(config) and (listing.captions is None or config.text.keep == "none"):
        raise UserError(
            f"--add-stream {config.add_stream} adds captions, and "
            + (
                "--text.keep is none"
                if listing.captions is not None
                else f"--dataset {config.dataset} of this source has none"
            )
        )
    keep = "none" if listing.captions is None else config.text.keep or "embeddings"
    return config.model_copy(update={"text": config.text.model_copy(update={"keep": keep})})


def make_text_stream(
    config: ExtractConfig,
    listing: Listing,
    info: TextEncoderInfo,
    null: WeightsFile,
    compute: ComputeInfo,
) -> TextStream:
    """The manifest's entry of the captions. Raises ``UserError``."""
    assert config.text.keep in ("embeddings", "tokens")
    embeds = config.text.keep == "embeddings"
    taken_over = any(item.contexts for item in listing.items)
    sizes = [len(pack_texts(item.captions)) for item in listing.items]
    counts = (len(item.contexts if taken_over else item.captions) for item in listing.items)
    captions = max(counts)
    return TextStream(
        kind="text",
        keeps=config.text.keep,
        columns=text_columns(
            info,
            config.text.codec if embeds else None,
            captions=captions,
            text_bytes=None if taken_over else max(sizes),
            compress=config.compress,
        ),
        captions=captions,
        captions_sha256=listing.captions_sha256(),
        encoder=info,
        null=null,
        compute=compute,
        added=config.add_stream is not None,
    )
