"""A directory of reference numbers: README.json says what is in it, tensors and values follow."""

from __future__ import annotations

import json
import re
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

HERE = Path(__file__).parent
SHARED = HERE.parents[2] / "shared" / "golden"
COPIED = HERE / "golden"
SHARED_RECIPES = HERE.parents[2] / "shared" / "golden_recipes"
COPIED_RECIPES = HERE / "golden_recipes"

# How far float32 arithmetic in another order may stray. README.json gives, for every forward
# tensor and gradient, the distance of the reference's own float32 run to its float64 run, and asks
# to stay within 30 times that.
NOISE_MULTIPLE = 30
# Issue 3 asks of the student 1e-5 of the output's scale (its largest magnitude); README.json asks
# the same of losses and norms. One float32 ulp is 1.2e-7 of the scale.
RELATIVE = 1e-5
# A mean of cosines may be near 0, where nothing is relative to it: two ulps of 1.
COSINE_FLOOR = 2.4e-7
# Where the reference records no noise (a product, a resampling): a few ulps.
ULPS = 1e-6


class Golden:
    """Reads one directory; every tensor comes as float32 (half-precision entries are exact)."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tensors = cache(self._tensors)
        self.values = cache(self._values)

    @cached_property
    def readme(self) -> dict[str, Any]:
        return json.loads((self.folder / "README.json").read_text())

    @property
    def configs(self) -> dict[str, Any]:
        return self.readme["configs"]

    def _tensors(self, name: str) -> dict[str, Tensor]:
        """All of ``NAME.safetensors``."""
        tensors = load_file(self.folder / f"{name}.safetensors")
        return {key: t.float() if t.is_floating_point() else t for key, t in tensors.items()}

    def _values(self, name: str) -> dict[str, Any]:
        """All of ``NAME.json``."""
        return json.loads((self.folder / f"{name}.json").read_text())

    def noise(self, file: str, name: str) -> float | None:
        """Largest difference between the reference's float32 and float64 runs, where recorded."""
        entry = self.readme["files"][f"{file}.safetensors"]["tensors"].get(name, {})
        return entry.get("float64_rerun_max_abs_diff")

    def numbered(self, file: str, pattern: str) -> tuple[str, int]:
        """The tensor whose name matches ``pattern``, and the block number in the name."""
        (match,) = [m for m in (re.fullmatch(pattern, n) for n in self.tensors(file)) if m]
        return match[0], int(match[1])

    def image(self, name: str) -> Path:
        """An image file; skips the test where the directory holds no images at all."""
        if not any(path.suffix in (".jpg", ".png") for path in self.folder.iterdir()):
            pytest.skip(f"{self.folder} holds numbers only, no images")
        return self.folder / name

    def tolerance(self, file: str, name: str, *, strict: bool = False) -> float:
        """How far a tensor may be from the recorded one: 30 times its noise; with ``strict`` 1e-5
        of its scale where that is less."""
        scale = self.tensors(file)[name].abs().max().item()
        tolerance = max(NOISE_MULTIPLE * (self.noise(file, name) or 0.0), ULPS * scale)
        return min(tolerance, RELATIVE * scale) if strict else tolerance

    def check(self, file: str, name: str, actual: Tensor, *, strict: bool = False) -> None:
        """``actual`` is the tensor NAME of FILE, within its tolerance."""
        tolerance = self.tolerance(file, name, strict=strict)
        check_close(f"{file}: {name}", actual, self.tensors(file)[name], tolerance)


def check_close(what: str, actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Same shape, and no element further apart than ``tolerance``."""
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}"
    difference = (actual.detach().double() - expected.double()).abs().max().item()
    assert difference <= tolerance, f"{what}: differs by {difference:.3g}, allowed {tolerance:.3g}"


def check_number(what: str, actual: float | Tensor, expected: float, *, floor: float = 0.0) -> None:
    """Equal within 1e-5 of ``expected``, or within ``floor``."""
    value = actual.item() if isinstance(actual, Tensor) else actual
    allowed = max(RELATIVE * abs(expected), floor)
    assert abs(value - expected) <= allowed, f"{what}: {value}, not {expected}"


def probes(logits: Tensor, vectors: Tensor) -> Tensor:
    """Logits (..., N) times fixed vectors (P, N) over the keys: (..., P) covers every logit."""
    return torch.einsum("...qk,pk->...qp", logits.double(), vectors.double())


def entropy(logits: Tensor) -> Tensor:
    """Of the softmax over keys, in nats."""
    log_probs = torch.log_softmax(logits.double(), dim=-1)
    return -(log_probs.exp() * log_probs).sum(-1)
