"""The Inception network of every published FID (Szegedy et al., arXiv 1512.00567; the weights of
2015-12-05 that TensorFlow ships), as torch-fidelity ports it with TensorFlow's resizing."""

from __future__ import annotations

import contextlib
import io
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch_fidelity.feature_extractor_inceptionv3 import (
    URL_INCEPTION_V3,
    FeatureExtractorInceptionV3,
)

from pipeline.evaluate.features.base import Extracted, full_precision
from pipeline.hashing import sha256_of_module
from pipeline.storage.files import redact
from pipeline.teachers.weights import read_state_dict
from schemas.errors import UserError

NAME = "inception-v3"
WIDTH = 2048
SPATIAL_CHANNELS = 7
GRID = 17
SPATIAL_WIDTH = SPATIAL_CHANNELS * GRID * GRID
OPTION = "--inception-weights"

HOW_TO_GET = (
    f"download {URL_INCEPTION_V3} and give it as {OPTION} FILE, or choose another network with "
    "--network ID --network-weights FILE|hub|random"
)


class InceptionNetwork:
    """Pooled features, ADM's spatial features and logits, of uint8 images of any size."""

    name = NAME
    size = 299
    width = WIDTH

    def __init__(self, weights: str, *, device: torch.device | str = "cpu") -> None:
        """``weights``: a file in torch-fidelity's and pytorch-fid's key format, or ``hub``, which
        fetches it to torch's cache unless it is there. Raises ``UserError`` saying how to get
        it."""
        self.shown_weights = redact(weights)
        state = _fetch() if weights == "hub" else _read(weights)
        copy = io.BytesIO()  # torch-fidelity unpickles whatever it is given: only our own tensors
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
                f"{OPTION} '{self.shown_weights}' are not of the Inception network of FIDs "
                f"({lines[min(1, len(lines) - 1)][:160]}); {HOW_TO_GET}"
            ) from None
        self.weights_sha256 = sha256_of_module(self._model)
        self.device = torch.device(device)
        self._model.to(self.device)
        self._spatial: Tensor | None = None
        # ADM's "mixed_6/conv:0": the first branch (after its ReLU) of the block that PyTorch
        # ports call Mixed_6d, by torch-fidelity's own table of names
        self._model.Mixed_6d.branch1x1.register_forward_hook(self._keep_spatial)

    @property
    def identity(self) -> dict[str, Any]:
        """What must agree for two sets of features to be comparable, for files."""
        return {"network": NAME, "size": self.size, "weights_sha256": self.weights_sha256}

    def features(self, images_B3RR: Tensor) -> Tensor:
        """(B, 2048) float32: the last pooling layer, "pool_3:0"."""
        return self.extract(images_B3RR).features

    def extract(self, images_B3RR: Tensor) -> Extracted:
        """Pooled features (B, 2048); spatial ones (B, 2023), 17 x 17 places of 7 channels in
        TensorFlow's order; logits (B, 1008) without the bias, as ADM's evaluator makes them."""
        with torch.inference_mode(), full_precision():
            features, logits = self._model(images_B3RR.to(self.device))
        assert self._spatial is not None
        spatial, self._spatial = self._spatial, None
        return Extracted(features, spatial, logits)

    def _keep_spatial(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        self._spatial = output[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1).float()


def _read(weights: str) -> dict[str, Tensor]:
    path = Path(weights).expanduser()
    if not path.exists():
        raise UserError(f"{OPTION} '{weights}': no such file; {HOW_TO_GET}")
    return read_state_dict(path, option=OPTION)


def _fetch() -> dict[str, Tensor]:
    try:
        with contextlib.redirect_stdout(sys.stderr):
            state: dict[str, Tensor] = torch.hub.load_state_dict_from_url(
                URL_INCEPTION_V3, map_location="cpu", check_hash=True, weights_only=True
            )
    except Exception as error:  # urllib, http and torch raise their own types
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise UserError(
            f"the Inception network's weights are not at hand and cannot be fetched ({reason}); "
            f"{HOW_TO_GET}"
        ) from None
    return state
