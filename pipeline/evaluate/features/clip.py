"""CLIP score: agreement of images with their captions (arXiv 2104.08718), through Transformers.

As in torchmetrics it is max(100 mean cos, 0), without the paper's factor of 2.5.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision.transforms.v2.functional as images_to
from torch import Tensor
from torchvision.transforms import InterpolationMode

from pipeline.evaluate.features.base import full_precision
from pipeline.evaluate.images.sources import Images
from pipeline.hashing import sha256_of_module
from pipeline.precision import check_finite
from pipeline.storage.files import redact
from pipeline.teachers.weights import read_state_dict
from pipeline.text_encoders.encoder import OPENAI_CLIP, seeded
from pipeline.text_encoders.key_formats import convert_clip
from pipeline.text_encoders.package import loading, transformers
from pipeline.text_encoders.tokenizer import (
    CLIP_POSITIONS,
    OPEN_CLIP,
    CaptionTokenizer,
    has_open_clip,
)
from schemas.errors import UserError, plain_text
from schemas.evaluate import EvaluateConfig
from schemas.fields import DIGEST
from schemas.sample import CAPTIONS_FILE

VISION = {
    "openai/clip-vit-large-patch14": (1024, 4096, 16, 24, 14),
    "openai/clip-vit-base-patch32": (768, 3072, 12, 12, 32),
    "openai/clip-vit-base-patch16": (768, 3072, 12, 12, 16),
}
"""Width, width of the MLP, heads, layers and patch of OpenAI's image encoders."""
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
"""Statistics of OpenAI's training images, in [0, 1]."""
SIZE_KEYS = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers")

logger = logging.getLogger(__name__)


def open_clip_score(config: EvaluateConfig, images: Images, device: str) -> ClipScore:
    """The network that ``config`` names. Raises ``UserError``, also where ``images`` have no
    captions."""
    assert config.clip_weights is not None
    if images.captions() is None:
        raise UserError(
            "--clip-weights: --samples has no captions: expected 'captions' in the .npz, or "
            f"{CAPTIONS_FILE} in the folder, as jobs/sample.py --caption, --captions or --store "
            "writes them"
        )
    return ClipScore(config.clip, config.clip_weights, seed=config.seed, device=device)


class ClipScore:
    """Mean of 100 cos(image, caption) over all images that ``add`` gets."""

    def __init__(
        self,
        name: str,
        weights: str,
        *,
        seed: int = 0,
        device: torch.device | str = "cpu",
        option: str = "--clip",
    ) -> None:
        """``name`` is a hub id or folder, ``weights`` a file, ``hub`` or ``random`` (from
        ``seed``). Raises ``UserError`` naming ``option``."""
        model = _load(name, weights, seed, option)
        check_finite(model.state_dict(), f"{option}-weights '{redact(weights)}'")
        self.size = int(model.config.vision_config.image_size)
        self.name = f"{name} ({sha256_of_module(model)[:DIGEST]})"
        tokens = min(CLIP_POSITIONS, int(model.config.text_config.max_position_embeddings))
        self._tokenizer = CaptionTokenizer(_tokenizer_place(name), tokens)
        self._device = torch.device(device)
        self._model = model.requires_grad_(False).eval().to(self._device)
        self._sum, self._count, self._truncated = 0.0, 0, 0

    def add(self, images_B3RR: Tensor, captions: Sequence[str]) -> None:
        """Add uint8 images of any size, each with its caption. They are resized to the network's
        size along the shorter side (bicubic, antialiased) and cut in the centre."""
        images = images_to.resize(
            images_B3RR.to(self._device), [self.size], InterpolationMode.BICUBIC, antialias=True
        )
        images = images_to.center_crop(images, [self.size, self.size])
        pixels = images_to.normalize(images.float() / 255, list(MEAN), list(STD))
        tokens = self._tokenizer(captions)
        ids, mask = (torch.from_numpy(array).to(self._device) for array in tokens[:2])
        with torch.inference_mode(), full_precision():
            output = self._model(input_ids=ids, attention_mask=mask, pixel_values=pixels)
            pairs = (output.image_embeds, output.text_embeds)
            cosines = torch.cosine_similarity(*(pair.double() for pair in pairs))
        self._sum += float(cosines.sum())
        self._count += len(captions)
        self._truncated += int(np.count_nonzero(tokens.lengths > self._tokenizer.max_tokens))

    def score(self) -> float:
        """The score, 0 to 100; logs how many captions were truncated."""
        if self._truncated:
            logger.warning(
                "clip_score: %d of %d captions were truncated to %d tokens",
                self._truncated,
                self._count,
                self._tokenizer.max_tokens,
            )
        return min(100.0, max(0.0, 100 * self._sum / self._count))


def _tokenizer_place(name: str) -> str:
    if os.path.isdir(name) and any(Path(name).glob("tokenizer*")):
        return name
    local = os.path.isdir(name) or name in VISION
    return OPEN_CLIP if local and has_open_clip() else name


def _load(name: str, weights: str, seed: int, option: str) -> Any:
    library = transformers()
    config = _settings(name, weights, option)
    if weights == "hub":
        with loading(name, "model.safetensors", option):
            return library.CLIPModel.from_pretrained(name, config=config, dtype=torch.float32)
    try:
        with seeded(seed):
            model = library.CLIPModel(config)
    except (ValueError, TypeError, RuntimeError, ZeroDivisionError) as error:
        reason = plain_text(str(error))[:200]
        raise UserError(f"{option} '{name}' cannot be built ({reason})") from None
    if weights != "random":
        path = Path(weights).expanduser()
        if not path.exists():
            raise UserError(
                f"{option}-weights '{weights}': no such file; expected a FILE, 'hub' or 'random'"
            )
        content: Mapping[str, Any] = read_state_dict(path, option=f"{option}-weights")
        content = content.get("state_dict", content)
        tensors = {key: value for key, value in content.items() if isinstance(value, Tensor)}
        try:
            model.load_state_dict(convert_clip(tensors, model.state_dict()), strict=False)
        except ValueError as error:
            raise UserError(f"{option}-weights '{path}' do not fit '{name}': {error}") from None
    return model.float()


def _settings(name: str, weights: str, option: str) -> Any:
    """Config of the network, of this machine where it is a known one."""
    library = transformers()
    if name in VISION and weights != "hub" and not os.path.isdir(name):
        *vision, patch = VISION[name]
        return library.CLIPConfig(
            text_config=dict(zip(SIZE_KEYS, OPENAI_CLIP[name], strict=True)),
            vision_config={**dict(zip(SIZE_KEYS, vision, strict=True)), "patch_size": patch},
            projection_dim=OPENAI_CLIP[name][0],
        )
    with loading(name, "config.json", option):
        config = library.AutoConfig.from_pretrained(name)
    if config.model_type != "clip":
        raise UserError(f"{option} '{name}' is of type {config.model_type}, not a CLIP")
    return config
