"""Detection of losses, gradients and weights that are not finite, on all workers together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from pipeline.alignment.aligned_student import LOSSES
from pipeline.distributed.process_group import ProcessGroup
from pipeline.precision import is_finite
from schemas.errors import NonFiniteError

NORM = "gradient norm"
NEVER = 1 << 62


class FiniteWatch:
    """First step whose results were not finite, noted on the device.

    ``note`` does not wait for the device; ``check`` does, and is called where results are read or
    written anyway.
    """

    def __init__(self, group: ProcessGroup, limit: int, losses: Sequence[str] = LOSSES) -> None:
        """``limit``: steps in a row that may be skipped. ``losses``: names of the losses in the
        result of ``Trainer.train_step``."""
        self.group = group
        self.limit = limit
        self.quantities = (*map(_quantity, losses), NORM)
        self._first = torch.full((len(self.quantities),), NEVER, device=group.device)
        self._in_a_row = torch.zeros((), dtype=torch.int64, device=group.device)
        self._fatal: Tensor | None = None  # None: every step is

    def note(self, step: int, result: Tensor, skipped: Tensor | None) -> None:
        """Add this rank's ``result`` of ``Trainer.train_step``. ``skipped``: bool, equal on all
        ranks, where such steps are skipped; None where they are not."""
        self._first = torch.where(result.isfinite(), self._first, self._first.clamp(max=step))
        if skipped is None:
            return
        self._in_a_row = (self._in_a_row + 1) * skipped
        beyond = self._in_a_row > self.limit
        self._fatal = beyond if self._fatal is None else self._fatal | beyond
        self._first = torch.where(skipped | self._fatal, self._first, NEVER)

    def check(self, weights: Mapping[str, Iterable[Tensor]]) -> None:
        """Raises ``NonFiniteError``, on every rank, where the results of a step on one of them or
        the ``weights``, by name, are not finite. Every rank calls it."""
        first = self._first
        if self._fatal is not None:
            first = torch.where(self._fatal, first, NEVER)
        broken = [~all_finite(tensors, self.group.device) for tensors in weights.values()]
        rows = self.group.gather(torch.stack([*first.double(), *(one.double() for one in broken)]))
        steps = [row[: len(self.quantities)] for row in rows]
        step = min(min(row) for row in steps)
        if step < NEVER:
            more = f", the first of {self.limit + 1} such steps in a row"
            raise NonFiniteError(
                f"{self._culprit(steps, step)} is not finite at step {int(step)}"
                + ("" if self._fatal is None else more)
            )
        for number, name in enumerate(weights, start=len(self.quantities)):
            broken_on = [row[number] for row in rows]
            if any(broken_on):
                raise NonFiniteError(f"the {name} of {_workers(broken_on)} is not finite")

    def _culprit(self, steps: list[list[float]], step: float) -> str:
        """Names of quantity and workers. The norm is named only where all losses were finite,
        because it follows from them, on all workers."""
        for number, name in enumerate(self.quantities):
            broken = [row[number] == step for row in steps]
            if any(broken):
                return f"the {name} of {_workers(broken)}"
        raise AssertionError("no result is of this step")


def all_finite(tensors: Iterable[Tensor], device: torch.device) -> Tensor:
    """If all numbers are finite: bool, on the device."""
    found = [is_finite(tensor).to(device) for tensor in tensors]
    return torch.stack(found).all() if found else torch.ones((), dtype=torch.bool, device=device)


def _quantity(loss: str) -> str:
    name = loss.replace("_", " ")
    return name if loss == "teacher_entropy" else f"{name} loss"


def _workers(chosen: list[bool] | list[float]) -> str:
    ranks = [str(rank) for rank, one in enumerate(chosen) if one]
    return f"worker{'s' if len(ranks) > 1 else ''} {', '.join(ranks)}"
