"""Features of frozen timm networks."""

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

from pipeline.evaluate.features.base import NetworkOutput, full_precision
from pipeline.hashing import sha256_of_module
from pipeline.precision import check_finite
from pipeline.storage.files import redact
from pipeline.teachers.vit import normalisation, weights_access
from pipeline.teachers.weights import randomise, read_state_dict
from schemas.errors import UserError, plain_text


class FeatureNetwork:
    """Pooled features of a timm network: the input of its classifier.

    Images are resized as in timm's evaluation transform (antialiased, in 8 bits, with the
    interpolation of the network's training) and normalised by the network's mean and std.
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
        """``weights`` is a file, with or without a classifier, or ``hub``, or ``random`` (from
        ``seed``). ``size`` is the side of the network's input in pixels, by default its own. Raises
        ``UserError`` naming ``option``."""
        self.name = name
        model = _create(name, weights, size, dict(arguments or {}), option)
        config: dict[str, Any] = model.pretrained_cfg
        self.size = size or int(config["input_size"][-1])
        if weights == "random":
            randomise(model, seed)
        elif weights != "hub":
            _load(model, name, weights, f"{option}-weights")
        check_finite(model.state_dict(), f"{option}-weights '{redact(weights)}'")
        self.weights_sha256 = sha256_of_module(model)
        self._weights, self._arguments = weights, dict(arguments or {})
        self._interpolation = InterpolationMode(config.get("interpolation") or "bicubic")
        self._mean, self._std = normalisation(model)
        self.device = torch.device(device)
        self._model = model.requires_grad_(False).eval().to(self.device)
        self._option = option
        self.width = self.features(torch.zeros(1, 3, 8, 8, dtype=torch.uint8)).shape[1]

    @property
    def identity(self) -> dict[str, Any]:
        """Values that must be equal for features to be comparable, for files."""
        return {
            "network": self.name,
            "arguments": self._arguments,
            "size": self.size,
            "weights_sha256": self.weights_sha256,
        }

    @property
    def shown_weights(self) -> str:
        """Source of the weights, for messages."""
        return redact(self._weights)

    def features(self, images_B3RR: Tensor) -> Tensor:
        """float32 (B, D) on the network's device for uint8 images of any size, on any device.
        Raises ``UserError`` where the network does not accept its input size."""
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
            reason = plain_text(str(error))[:200]
            raise UserError(
                f"{self._option} '{self.name}' does not accept images of {self.size} pixels: "
                f"{reason}; choose another {self._option}-size"
            ) from None
        if features.ndim != 2:
            raise UserError(
                f"{self._option} '{self.name}' has no pooling: its features have shape "
                f"{tuple(features.shape[1:])} per image; choose another network"
            )
        return features.float()

    def extract(self, images_B3RR: Tensor) -> NetworkOutput:
        """``features``, without the outputs that only Inception defines."""
        return NetworkOutput(self.features(images_B3RR))


def _create(
    name: str, weights: str, size: int | None, arguments: dict[str, Any], option: str
) -> Any:
    """The network without a classifier, built for ``size`` if it has a fixed input size."""
    hub = weights == "hub"
    try:
        if size is not None:
            with torch.device("meta"):
                meta_model = timm.create_model(name, num_classes=0, **arguments)
            default = meta_model.pretrained_cfg.get("input_size")
            # convolutions accept any size; a network with a fixed size takes it as an argument
            fixed = meta_model.pretrained_cfg.get("fixed_input_size")
            if fixed and default and default[-1] != size:
                arguments = {"img_size": size, **arguments}
        with (
            contextlib.redirect_stdout(sys.stderr),
            weights_access(name) if hub else contextlib.nullcontext(),
        ):
            model = timm.create_model(name, pretrained=hub, num_classes=0, **arguments)
    except Exception as error:  # errors of the model's constructor or of the hub
        reason = plain_text(str(error))[:200] or type(error).__name__
        hint = f"; {option}-weights FILE loads a local copy" if hub else ""
        raise UserError(f"{option} '{name}': {reason}{hint}") from None
    if size is None and not model.pretrained_cfg.get("input_size"):
        raise UserError(f"{option} '{name}' has no default input size: give {option}-size")
    return model


def _load(model: Any, name: str, weights: str, option: str) -> None:
    """Load a file with the keys of timm or of the network's authors, without its classifier."""
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
        prefixes = tuple(f"{head}." for head in heads)
        expected = model.state_dict().keys()
        state = {
            key: value
            for key, value in state.items()
            if key in expected or not key.startswith(prefixes)
        }
        model.load_state_dict(state)
    except (RuntimeError, ValueError) as error:
        lines = [line.strip() for line in str(error).splitlines()] or [type(error).__name__]
        reason = lines[min(1, len(lines) - 1)][:200]
        raise UserError(f"{option} '{path}' do not fit '{name}': {reason}") from None
    except Exception:  # timm's converters raise any type on files of other models
        raise UserError(
            f"{option} '{path}' do not fit '{name}': not a checkpoint in a format that timm "
            "converts for this model"
        ) from None
