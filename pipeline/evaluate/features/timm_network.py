"""Frozen timm networks that turn images into features."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision.transforms.v2.functional as images_to
from torch import Tensor
from torchvision.transforms import InterpolationMode

from pipeline.evaluate.features.base import Extracted, full_precision
from pipeline.hashing import sha256_of_module
from pipeline.storage.files import redact
from pipeline.teachers.vit import normalisation
from pipeline.teachers.weights import randomise, read_state_dict
from schemas.errors import UserError


class FeatureNetwork:
    """The pooled features that a timm network's classifier would see.

    Images are resized as timm's evaluation transform does (antialiased, by the interpolation that
    the network was trained with, in 8 bits) and normalised by its mean and std.
    """

    def __init__(
        self,
        name: str,
        weights: str,
        *,
        size: int | None = None,
        seed: int = 0,
        arguments: Mapping[str, Any] | None = None,
        device: torch.device | str = "cpu",
        option: str = "--network",
    ) -> None:
        """``weights``: a file (a classifier's, too), ``hub``, or ``random`` (of ``seed``).
        ``size``: pixels per side of what the network sees; default its own. Raises ``UserError``
        naming ``option``."""
        self.name = name
        model = _create(name, weights, size, dict(arguments or {}), option)
        about: dict[str, Any] = model.pretrained_cfg
        self.size = size or int(about["input_size"][-1])
        if weights == "random":
            randomise(model, seed)
        elif weights != "hub":
            _load(model, name, weights, f"{option}-weights")
        self.weights_sha256 = sha256_of_module(model)
        self._weights, self._arguments = weights, dict(arguments or {})
        self._interpolation = InterpolationMode(about.get("interpolation") or "bicubic")
        self._mean, self._std = normalisation(model)
        self.device = torch.device(device)
        self._model = model.requires_grad_(False).eval().to(self.device)
        self._option = option
        self.width = self.features(torch.zeros(1, 3, 8, 8, dtype=torch.uint8)).shape[1]

    @property
    def identity(self) -> dict[str, Any]:
        """What must agree for two sets of features to be comparable, for files."""
        return {
            "network": self.name,
            "arguments": self._arguments,
            "size": self.size,
            "weights_sha256": self.weights_sha256,
        }

    @property
    def shown_weights(self) -> str:
        """Where the weights came from, for people."""
        return redact(self._weights)

    def features(self, images_B3RR: Tensor) -> Tensor:
        """uint8 images of any one size, on any device, to float32 (B, D) on the network's. Raises
        ``UserError`` where the network cannot see images of its input size."""
        size = [self.size, self.size]
        images = images_B3RR.to(self.device)
        if list(images.shape[-2:]) != size:
            images = images_to.resize(images, size, self._interpolation, antialias=True)
        pixels = images_to.normalize(images.float() / 255, list(self._mean), list(self._std))
        try:
            with torch.inference_mode(), full_precision():
                features: Tensor = self._model(pixels)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, AssertionError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"{self._option} '{self.name}' cannot see images of {self.size} pixels: {reason}; "
                f"choose another {self._option}-size"
            ) from None
        if features.ndim != 2:
            raise UserError(
                f"{self._option} '{self.name}' does not pool: its features have shape "
                f"{tuple(features.shape[1:])} per image; choose another network"
            )
        return features.float()

    def extract(self, images_B3RR: Tensor) -> Extracted:
        """As ``features``."""
        return Extracted(self.features(images_B3RR))


def _create(
    name: str, weights: str, size: int | None, arguments: dict[str, Any], option: str
) -> Any:
    """Without a classifier, evaluation's numbers only, at the wanted input size."""
    hub = weights == "hub"
    try:
        if size is not None:
            with torch.device("meta"):
                draft = timm.create_model(name, num_classes=0, **arguments)
            own = draft.pretrained_cfg.get("input_size")
            # convolutions take any size; what is built for one wants to be told
            if draft.pretrained_cfg.get("fixed_input_size") and own and own[-1] != size:
                arguments = {"img_size": size, **arguments}
        with contextlib.redirect_stdout(sys.stderr):
            model = timm.create_model(name, pretrained=hub, num_classes=0, **arguments)
    except Exception as error:  # timm raises whatever its model's constructor or the hub raises
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        hint = f"; {option}-weights FILE takes a local copy" if hub else ""
        raise UserError(f"{option} '{name}': {reason}{hint}") from None
    if size is None and not model.pretrained_cfg.get("input_size"):
        raise UserError(f"{option} '{name}' has no input size of its own: give {option}-size")
    return model


def _load(model: Any, name: str, weights: str, option: str) -> None:
    """From a file in timm's key format or the network's authors', a classifier left out."""
    path = Path(weights).expanduser()
    if not path.exists():
        raise UserError(f"{option} '{weights}': no such file; expected a FILE, 'hub' or 'random'")
    state = read_state_dict(path, option=option)
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    classifiers = model.pretrained_cfg.get("classifier") or ()
    heads = (classifiers,) if isinstance(classifiers, str) else tuple(classifiers)
    try:
        if convert is not None:
            with contextlib.redirect_stdout(sys.stderr):
                state = convert(state, model)
        starts = tuple(f"{head}." for head in heads)
        wanted = model.state_dict().keys()
        state = {
            key: value
            for key, value in state.items()
            if key in wanted or not key.startswith(starts)
        }
        model.load_state_dict(state)
    except (RuntimeError, ValueError) as error:
        lines = [line.strip() for line in str(error).splitlines()] or [type(error).__name__]
        reason = lines[min(1, len(lines) - 1)][:200]
        raise UserError(f"{option} '{path}' do not fit '{name}': {reason}") from None
    except Exception:  # timm's converters trip in their own ways over files of other things
        raise UserError(
            f"{option} '{path}' do not fit '{name}': not a checkpoint in a format that timm knows "
            "for this model"
        ) from None
