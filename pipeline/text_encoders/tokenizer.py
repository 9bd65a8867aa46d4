"""Captions to token ids of fixed length."""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from pipeline.text_encoders.package import loading, transformers
from schemas.errors import UserError

OPEN_CLIP = "open_clip"
VOCABULARY = "bpe_simple_vocab_16e6.txt.gz"
"""OpenAI's file of merges, as the package open_clip_torch contains it."""
MERGES = 49152 - 256 - 2
"""Merges that CLIP uses; the file has more."""
CLIP_POSITIONS = 77


class CaptionTokens(NamedTuple):
    """Token ids of n captions, T tokens each."""

    ids: np.ndarray
    """int64 (n, T), truncated or padded."""
    mask: np.ndarray
    """int64 (n, T): 1 for tokens, 0 for padding."""
    lengths: np.ndarray
    """int64 (n,): tokens before truncation, start and end included."""


class CaptionTokenizer:
    """A tokenizer of Transformers with its own padding and truncation."""

    def __init__(self, place: str, max_tokens: int) -> None:
        """``place`` is a hub id, a folder or 'open_clip'. Raises ``UserError``."""
        self.place = place
        self.max_tokens = max_tokens
        self._tokenizer = clip_tokenizer() if place == OPEN_CLIP else _load(place)
        if self._tokenizer.pad_token_id is None:
            raise UserError(f"--text.tokenizer '{place}' has no padding token")

    def __call__(self, captions: Sequence[str]) -> CaptionTokens:
        texts = list(captions)
        full = self._tokenizer(texts, verbose=False)["input_ids"]
        padded = self._tokenizer(
            texts,
            padding="max_length",
            truncation=True,
            max_length=self.max_tokens,
            return_attention_mask=True,
            return_tensors="np",
        )
        return CaptionTokens(
            padded["input_ids"].astype(np.int64),
            padded["attention_mask"].astype(np.int64),
            np.array([len(ids) for ids in full], np.int64),
        )

    def sha256(self) -> str:
        """SHA-256 of the vocabulary and the rules, or of the vocabulary alone where the library
        does not give its rules."""
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        if backend is None:
            rules = repr(sorted(self._tokenizer.get_vocab().items()))
        else:
            backend.no_truncation()  # both are of the last call
            backend.no_padding()
            rules = backend.to_str()
        return hashlib.sha256(rules.encode()).hexdigest()


def has_open_clip() -> bool:
    return importlib.util.find_spec(OPEN_CLIP) is not None


def clip_tokenizer() -> Any:
    """CLIP's tokenizer of the vocabulary file in open_clip_torch: lower-cased byte-pair encoding,
    padded with the end token 49407 as openai/clip-vit-large-patch14 is, where open_clip pads with
    0. Raises ``UserError``."""
    library = transformers()
    package = importlib.util.find_spec(OPEN_CLIP)
    if package is None or not package.submodule_search_locations:
        raise UserError(
            "--text.tokenizer open_clip: the package open_clip_torch is not installed: pip install "
            "'.[text]'"
        )
    # the package itself is not imported, which would take seconds
    folder = package.submodule_search_locations[0]
    with gzip.open(f"{folder}/{VOCABULARY}", "rt", encoding="utf-8") as file:
        lines = file.read().split("\n")[1 : MERGES + 1]
    merges = [(first, second) for first, second in (line.split() for line in lines)]
    letters = _byte_letters()
    words = [*letters, *(f"{letter}</w>" for letter in letters), *(a + b for a, b in merges)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: number for number, word in enumerate(words)}
    return library.CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=CLIP_POSITIONS)


def _byte_letters() -> list[str]:
    """The printable letter that stands for each byte in CLIP's vocabulary, in its order: printable
    bytes first, which stand for themselves, then the others as letters from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = 256 - len(printable)
    return [chr(number) for number in (*printable, *range(256, 256 + others))]


def _load(place: str) -> Any:
    library = transformers()
    with loading(place, "tokenizer_config.json", "--text.tokenizer"):
        return library.AutoTokenizer.from_pretrained(place)
