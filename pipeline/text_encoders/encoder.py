"""One interface to Transformers' text encoders: captions in, the last hidden state out."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.hashing import sha256_of_module
from pipeline.precision import check_finite
from pipeline.teachers.weights import read_state_dict
from pipeline.text_encoders.key_formats import convert_weights
from pipeline.text_encoders.package import loading, transformers
from pipeline.text_encoders.tokenizer import (
    OPEN_CLIP,
    CaptionTokenizer,
    CaptionTokens,
    has_open_clip,
)
from schemas.errors import UserError, plain_text
from schemas.extract import TextConfig
from schemas.networks import TextEncoderInfo

USUAL_TOKENS = 77
"""Tokens of a caption where the encoder has no limit: CLIP's, as in the text-to-image recipes."""
OPENAI_CLIP = {
    "openai/clip-vit-large-patch14": (768, 3072, 12, 12),
    "openai/clip-vit-base-patch32": (512, 2048, 8, 12),
    "openai/clip-vit-base-patch16": (512, 2048, 8, 12),
}
"""Width, width of the MLP, heads and layers of OpenAI's text encoders: known without the hub."""
T5_V1_1 = {
    "google/t5-v1_1-small": (512, 1024, 6, 8),
    "google/t5-v1_1-base": (768, 2048, 12, 12),
    "google/t5-v1_1-large": (1024, 2816, 16, 24),
    "google/t5-v1_1-xl": (2048, 5120, 32, 24),
    "google/t5-v1_1-xxl": (4096, 10240, 64, 24),
}
"""The same of T5 version 1.1."""


def encoder_size(config: TextConfig) -> tuple[int, int]:
    """Tokens of a caption and width of the encoder, without its weights; of known encoders also
    without Transformers. Raises ``UserError``."""
    known = {**OPENAI_CLIP, **T5_V1_1}.get(config.encoder)
    if known is not None and not config.model_args and not os.path.isdir(config.encoder):
        return config.max_tokens or USUAL_TOKENS, known[0]
    settings = _settings(config)
    tokens = config.max_tokens or _position_limit(settings) or USUAL_TOKENS
    return tokens, int(settings.hidden_size)


class TextEncoder(nn.Module):
    """A text encoder in float32, because its rounding error would be in every run; with
    ``keep: tokens`` only its tokenizer."""

    def __init__(self, config: TextConfig) -> None:
        """Raises ``UserError``."""
        super().__init__()
        self.config = config
        settings = _settings(config)
        self.is_clip = settings.model_type == "clip_text_model"
        limit = _position_limit(settings)
        tokens = config.max_tokens or limit or USUAL_TOKENS
        if limit is not None and tokens > limit:
            raise UserError(f"--text.max-tokens {tokens}: '{config.encoder}' has {limit} positions")
        self.width = int(settings.hidden_size)
        self.tokenizer = CaptionTokenizer(_tokenizer_place(config), tokens)
        self.model: Any = None
        self.weights_sha256: str | None = None
        if config.keep != "tokens":
            self.model = _load(config, settings)
            check_finite(self.model.state_dict(), f"--text.encoder '{config.encoder}'")
            self.weights_sha256 = sha256_of_module(self.model)
        self.requires_grad_(False).eval()
        if self.model is not None:
            try:
                self.encode(self.tokenizer([""]))
            except (RuntimeError, ValueError, TypeError, IndexError) as error:
                reason = plain_text(str(error))[:200]
                raise UserError(
                    f"--text.encoder '{config.encoder}' cannot encode a caption ({reason})"
                ) from None

    def info(self) -> TextEncoderInfo:
        config = self.config
        return TextEncoderInfo(
            encoder=config.encoder,
            weights=config.weights,
            seed=config.seed,
            model_args=config.model_args,
            weights_sha256=self.weights_sha256,
            tokenizer=self.tokenizer.place,
            tokenizer_sha256=self.tokenizer.sha256(),
            tokens=self.tokenizer.max_tokens,
            width=self.width,
        )

    @torch.no_grad()
    def encode(self, tokens: CaptionTokens) -> Tensor:
        """The last hidden state, after the final norm, of n captions: float32 (n, T, D), on the
        device of the weights.

        Raises ``UserError`` for ids that the encoder does not have.
        """
        device = next(self.model.parameters()).device
        if int(tokens.ids.max(initial=0)) >= self.vocabulary:
            raise UserError(
                f"--text.tokenizer '{self.tokenizer.place}' has token ids that '"
                f"{self.config.encoder}' does not have: they do not belong together"
            )
        ids, mask = (torch.from_numpy(values).to(device) for values in (tokens.ids, tokens.mask))
        return self.embed(ids, mask)

    @property
    def vocabulary(self) -> int:
        """Number of token ids that the encoder has."""
        return int(self.model.get_input_embeddings().num_embeddings)

    @torch.no_grad()
    def embed(self, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """The last hidden state, after the final norm, of B captions: float32 (B, T, E). ``mask``:
        true or 1 for tokens, else padding.

        CLIP gets no mask beyond its causal one, so that padding is encoded too, as in U-ViT's and
        HASTE's scripts; other encoders get the mask of padding.
        """
        mask = {} if self.is_clip else {"attention_mask": mask_BT.long()}
        hidden: Tensor = self.model(input_ids=ids_BT, **mask).last_hidden_state
        return hidden.float()

    def forward(self, captions: Sequence[str]) -> Tensor:
        """``encode`` of texts."""
        return self.encode(self.tokenizer(captions))


def _settings(config: TextConfig) -> Any:
    """Config of the text part of a model, of this machine where the encoder is a known one."""
    library = transformers()
    place = config.encoder
    is_folder = os.path.isdir(place)
    if place in OPENAI_CLIP and config.weights != "hub" and not is_folder:
        width, mlp, heads, layers = OPENAI_CLIP[place]
        settings = library.CLIPTextConfig(
            hidden_size=width,
            intermediate_size=mlp,
            num_attention_heads=heads,
            num_hidden_layers=layers,
        )
    elif place in T5_V1_1 and config.weights != "hub" and not is_folder:
        width, mlp, heads, layers = T5_V1_1[place]
        settings = library.T5Config(
            d_model=width,
            d_ff=mlp,
            d_kv=64,
            num_heads=heads,
            num_layers=layers,
            feed_forward_proj="gated-gelu",
        )
    else:
        with loading(place, "config.json", "--text.encoder"):
            settings = library.AutoConfig.from_pretrained(place)
        settings = getattr(settings, "text_config", None) or settings
    for key, value in config.model_args.items():
        if not hasattr(settings, key):
            raise UserError(f"--text.model-args.{key}: '{place}' has no key of this name")
        setattr(settings, key, value)
    if not isinstance(getattr(settings, "hidden_size", None), int):
        raise UserError(f"--text.encoder '{place}' is of type {settings.model_type}, not of texts")
    return settings


def _position_limit(settings: Any) -> int | None:
    """Positions of an encoder that learns an embedding of each; None for relative positions."""
    if settings.model_type in {"t5", "mt5", "umt5"}:
        return None
    limit = getattr(settings, "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


def _tokenizer_place(config: TextConfig) -> str:
    if config.tokenizer is not None:
        return config.tokenizer
    known = config.encoder in OPENAI_CLIP and not os.path.isdir(config.encoder)
    return OPEN_CLIP if known and has_open_clip() else config.encoder


def _load(config: TextConfig, settings: Any) -> Any:
    library = transformers()
    if settings.model_type == "clip_text_model":
        network = library.CLIPTextModel
    elif settings.model_type == "siglip_text_model":
        network = library.SiglipTextModel
    else:
        network = library.AutoModelForTextEncoding
    if config.weights == "hub":
        with loading(config.encoder, "model.safetensors", "--text.encoder"):
            return network.from_pretrained(config.encoder, config=settings, dtype=torch.float32)
    create = getattr(network, "from_config", network)
    try:
        with seeded(config.seed):
            model = create(settings)
    except (ValueError, TypeError, RuntimeError, ZeroDivisionError) as error:
        reason = plain_text(str(error))[:200]
        raise UserError(f"--text.encoder '{config.encoder}' cannot be built ({reason})") from None
    if config.weights != "random":
        _load_file(model, config)
    return model.float()


def _load_file(model: Any, config: TextConfig) -> None:
    path = Path(config.weights).expanduser()
    content: Mapping[str, Any] = read_state_dict(path, option="--text.weights")
    content = content.get("state_dict", content)
    tensors = {name: value for name, value in content.items() if isinstance(value, Tensor)}
    try:
        model.load_state_dict(convert_weights(tensors, model.state_dict()), strict=False)
    except ValueError as error:
        seen = ", ".join(f"'{name}'" for name in list(content)[:2]) or "none"
        raise UserError(
            f"--text.weights '{path}' do not fit '{config.encoder}': {error} (names seen: "
            f"{plain_text(seen)[:100]})"
        ) from None


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draws of torch from a seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
