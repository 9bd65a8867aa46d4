"""The training step of the HASTE or REPA repository, from a checkout of it: teacher online.

Model and loss are imported from the checkout. The rest of their training script (which needs other
packages and weights) is repeated here in the same order: teacher under autocast, loss, clipping,
AdamW, and an average of the weights parameter by parameter.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipeline.teachers import Teacher
from schemas.errors import UserError
from schemas.extract import TeacherConfig
from tests.bench.steps import Data, trace
from tests.bench.timing import Clock

MODULES = ("models", "models.sit", "loss")


@contextmanager
def peer_step(folder: Path, options: Any, data: Data, clock: Clock) -> Iterator[PeerSteps]:
    """Yield steps of the checkout ``folder``. Raises ``UserError`` where it is not one."""
    if not ((folder / "models" / "sit.py").is_file() and (folder / "loss.py").is_file()):
        raise UserError(
            f"--peer {folder}: not a checkout of HASTE or REPA (models/sit.py, loss.py)"
        )
    hidden = {name: sys.modules.pop(name) for name in MODULES if name in sys.modules}
    sys.path.insert(0, str(folder))
    try:
        yield PeerSteps(options, data, clock)
    finally:
        sys.path.remove(str(folder))
        for name in MODULES:
            sys.modules.pop(name, None)
        sys.modules.update(hidden)


class PeerSteps:
    """Steps of the authors' code on our batch: moments of latents, labels, 256-pixel crops."""

    def __init__(self, options: Any, data: Data, clock: Clock) -> None:
        models = importlib.import_module("models.sit").SiT_models
        loss = importlib.import_module("loss").SILoss
        if options.student not in models or options.depth or options.width:
            raise UserError(f"--peer has no {options.student} of this size: {', '.join(models)}")
        self.device = clock.device
        self.autocast = self.device.type == "cuda" and options.precision != "float32"
        self.aligns_attention = "proj_s" in inspect.signature(loss.__call__).parameters
        self.name = ("HASTE" if self.aligns_attention else "REPA") + "'s repository, teacher online"
        arguments = {"input_size": 32, "use_cfg": True, "z_dims": [768], "encoder_depth": 8}
        student = models[options.student](**arguments, fused_attn=True, qk_norm=False)
        self.model: nn.Module = student.to(self.device).train()
        self.average = copy.deepcopy(self.model).requires_grad_(False).eval()
        self.loss = loss()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        layers = tuple(range(12)) if self.aligns_attention else ()
        teacher = Teacher(TeacherConfig(weights="random"), resolution=256, layers=layers)
        self.teacher = teacher.to(self.device)
        latents = data.columns["latents"]
        self.mean, self.std = (torch.from_numpy(latents[n]).float() for n in ("mean", "std"))
        self.labels = torch.from_numpy(latents["label"])
        rng = torch.Generator().manual_seed(0)
        shape = (data.batch, 3, 256, 256)
        self.crops = torch.randint(256, shape, generator=rng, dtype=torch.uint8)
        if self.device.type == "cuda":  # as their loaders do
            self.mean, self.std, self.labels, self.crops = (
                x.pin_memory() for x in (self.mean, self.std, self.labels, self.crops)
            )

    def take(self, count: int) -> None:
        for _ in range(count):
            with redirect_stdout(io.StringIO()):  # their step prints an empty line
                self._step()

    def trace(self, folder: Path) -> None:
        trace(self, folder)

    def _step(self) -> None:
        crops, labels, mean, std = (
            x.to(self.device, non_blocking=True)
            for x in (self.crops, self.labels, self.mean, self.std)
        )
        with torch.no_grad():
            latents = (mean + std * torch.randn_like(mean)) * 0.18215
            with self._autocasting():
                targets = self.teacher(crops)
        aligned: dict[str, Any] = {"zs": [targets.features]}
        if self.aligns_attention:
            aligned = {
                "zs": [list(targets.attention_logits.unbind(1))],
                "proj_s": [targets.features],
            }
        with self._autocasting():
            parts = self.loss(self.model, latents, {"y": labels}, **aligned)
            total = parts[0].mean() + 0.5 * sum(part.mean() for part in parts[1:])
        total.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            averages = dict(self.average.named_parameters())
            for name, weight in self.model.named_parameters():
                averages[name].mul_(0.9999).add_(weight, alpha=1e-4)
        for part in parts:  # their script logs every step
            float(part.detach().mean())

    def _autocasting(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast)
