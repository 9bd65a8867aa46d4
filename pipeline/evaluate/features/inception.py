"""The Inception network of published FIDs (Szegedy et al., arXiv 1512.00567; TensorFlow's weights
of 2015-12-05), in torch-fidelity's port.

ADM's and torch-fidelity's numbers are with TensorFlow 1's bilinear resizing, whose samples are not
at pixel centres; pytorch-fid's, and with it U-ViT's, REPA's and HASTE's on MS-COCO, with PyTorch's.
"""

from __future__ import annotations

import contextlib
import io
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch_fidelity.feature_extractor_inceptionv3 import (
    URL_INCEPTION_V3,
    FeatureExtractorInceptionV3,
)

from pipeline.evaluate.features.base import NetworkOutput, full_precision
from pipeline.hashing import sha256_of_module
from pipeline.precision import check_finite
from pipeline.storage.files import redact
from pipeline.teachers.weights import read_state_dict
from schemas.errors import UserError, plain_text
from schemas.evaluate import Resizing

NAME = "inception-v3"
WIDTH = 2048
SPATIAL_CHANNELS = 7
GRID = 17
OPTION = "--inception-weights"

DOWNLOAD_HINT = (
    f"download {URL_INCEPTION_V3} and give it as {OPTION} FILE, or use another network with "
    "--network ID --network-weights FILE|hub|random"
)


class InceptionNetwork:
    """Pooled features, ADM's spatial features and logits of uint8 images of any size."""

    name = NAME
    size = 299
    width = WIDTH

    def __init__(
        self,
        weights: str,
        *,
        device: torch.device | str = "cpu",
        resizing: Resizing = "tensorflow",
    ) -> None:
        """``weights`` is a file with the keys of torch-fidelity and pytorch-fid, or ``hub``:
        torch's cache, with a download if needed. Raises ``UserError`` with the file's URL."""
        self.resizing = resizing
        self._pixels: Tensor | None = None
        self.shown_weights = redact(weights)
        state = _download() if weights == "hub" else _read(weights)
        copy = io.BytesIO()  # torch-fidelity unpickles its argument: pass only checked tensors
        torch.save(state, copy)
        copy.seek(0)
        layers = ["2048", "logits_unbiased"]
        try:
            self._model: Any = FeatureExtractorInceptionV3(
                NAME, layers, feature_extractor_weights_path=copy
            )
        except (RuntimeError, AttributeError) as error:
            lines = [line.strip() for line in str(error).splitlines()] or [type(error).__name__]
            raise UserError(
                f"{OPTION} '{self.shown_weights}' are not weights of the Inception network of FIDs "
                f"({lines[min(1, len(lines) - 1)][:160]}); {DOWNLOAD_HINT}"
            ) from None
        check_finite(self._model.state_dict(), f"{OPTION} '{self.shown_weights}'")
        self.weights_sha256 = sha256_of_module(self._model)
        self.device = torch.device(device)
        self._model.to(self.device)
        self._spatial: Tensor | None = None
        # ADM's "mixed_6/conv:0" is the first branch, after its ReLU, of the block Mixed_6d of
        # PyTorch ports, according to torch-fidelity's table of names
        self._model.Mixed_6d.branch1x1.register_forward_hook(self._save_spatial)
        if resizing == "pytorch":  # the port resizes by itself, just before this layer
            self._model.Conv2d_1a_3x3.register_forward_pre_hook(lambda *_: (self._pixels,))

    @property
    def identity(self) -> dict[str, Any]:
        """Values that must be equal for features to be comparable, for files."""
        return {
            "network": NAME,
            "size": self.size,
            "weights_sha256": self.weights_sha256,
            "resizing": self.resizing,
        }

    def extract(self, images_B3RR: Tensor) -> NetworkOutput:
        """Features of "pool_3:0" (B, 2048); spatial features (B, 2023), 17 x 17 positions with 7
        channels in TensorFlow's order; logits (B, 1008) without the bias, as in ADM's evaluator."""
        images = images_B3RR.to(self.device)
        with torch.inference_mode(), full_precision():
            if self.resizing == "pytorch":
                size = (self.size, self.size)
                resized = F.interpolate(images / 255, size, mode="bilinear", align_corners=False)
                self._pixels = 2 * resized - 1
            features, logits = self._model(images)
        self._pixels = None
        assert self._spatial is not None
        spatial, self._spatial = self._spatial, None
        return NetworkOutput(features, spatial, logits)

    def _save_spatial(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        self._spatial = output[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1).float()


def _read(weights: str) -> dict[str, Tensor]:
    path = Path(weights).expanduser()
    if not path.exists():
        raise UserError(f"{OPTION} '{weights}': no such file; {DOWNLOAD_HINT}")
    return read_state_dict(path, option=OPTION)


def _download() -> dict[str, Tensor]:
    try:
        with contextlib.redirect_stdout(sys.stderr):
            state: dict[str, Tensor] = torch.hub.load_state_dict_from_url(
                URL_INCEPTION_V3, map_location="cpu", check_hash=True, weights_only=True
            )
    except Exception as error:  # urllib, http and torch raise their own types
        reason = plain_text(str(error))[:120] or type(error).__name__
        raise UserError(
            f"the Inception network's weights are not in torch's cache and cannot be downloaded "
            f"({reason}); "
            f"{DOWNLOAD_HINT}"
        ) from None
    return state
