"""Train the demo's text encoder: a small CLIP text model that places captions of digits where the
demo's teacher sees the digits.

It is trained on the captions alone, with the contrastive loss of CLIP (arXiv 2103.00020) against
the teacher's mean class token of each digit, in seconds.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.pretrain.options import CAPTIONS, NAMES
from pipeline.text_encoders.encoder import seeded
from pipeline.text_encoders.package import transformers

WORDS = ("<pad>", "<start>", "<end>", "<unknown>", "a", "handwritten", "the", "digit", *NAMES)
TOKENS, WIDTH, STEPS, TEMPERATURE = 8, 64, 150, 0.1


def train_text_encoder(prototypes_DE: Tensor, folder: Path, seed: int = 0) -> float:
    """Train on all captions against ``prototypes`` (10, E), one for each digit, and write
    ``folder`` in Transformers' format, tokenizer included. Returns the fraction of captions that
    are nearest to their digit's prototype. Raises ``UserError`` without Transformers."""
    library = transformers()
    tokenizer = _make_tokenizer(library)
    config = library.CLIPTextConfig(
        vocab_size=len(WORDS),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=TOKENS,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    texts = [caption.format(name) for name in NAMES for caption in CAPTIONS]
    labels = torch.arange(len(NAMES)).repeat_interleave(len(CAPTIONS))
    ids = tokenizer(texts, padding="max_length", max_length=TOKENS, return_tensors="pt").input_ids
    centred = prototypes_DE - prototypes_DE.mean(0)
    targets = F.normalize(centred, dim=-1)
    with seeded(seed):
        model = library.CLIPTextModel(config)
        head = torch.nn.Linear(WIDTH, targets.shape[1])
    parameters = [*model.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=3e-3)
    for _ in range(STEPS):
        scores = _scores(model, head, ids, targets)
        optimizer.zero_grad()
        F.cross_entropy(scores / TEMPERATURE, labels).backward()
        optimizer.step()
    with torch.no_grad():
        right = (_scores(model, head, ids, targets).argmax(-1) == labels).float().mean().item()
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return right


def _scores(
    model: torch.nn.Module, head: torch.nn.Module, ids_CT: Tensor, targets_DE: Tensor
) -> Tensor:
    """Cosine of each caption's mean state with each target, (C, D)."""
    states = model(input_ids=ids_CT).last_hidden_state.mean(1)
    return F.normalize(head(states), dim=-1) @ targets_DE.T


def _make_tokenizer(library: object) -> object:
    """One token for each word of the captions."""
    import tokenizers
    from tokenizers import models, normalizers, pre_tokenizers, processors

    vocabulary = {word: number for number, word in enumerate(WORDS)}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(vocabulary, "<unknown>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", 1), ("<end>", 2)]
    )
    return library.PreTrainedTokenizerFast(  # type: ignore[attr-defined]
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<start>",
        eos_token="<end>",
        unk_token="<unknown>",
        model_max_length=TOKENS,
    )
