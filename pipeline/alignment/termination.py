"""When the alignment ends: triggers that look at a run and decide, once."""

from __future__ import annotations

from typing import Any, Protocol

from schemas.alignment import FixedStep, TerminationConfig


class Trigger(Protocol):
    """Decides about the termination. Every rank asks it at every step and must get one answer."""

    def known_step(self) -> int | None:
        """The termination step, where it is certain beforehand."""

    def evidence(self, step: int) -> dict[str, Any] | None:
        """At the boundary before ``step``: why to terminate now, or None to go on."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to decide the same."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a saved state."""


class FixedStepTrigger:
    """Terminates before step ``step`` (the paper's trigger, section 2.4)."""

    def __init__(self, config: FixedStep) -> None:
        self.step = config.step

    def known_step(self) -> int | None:
        return self.step

    def evidence(self, step: int) -> dict[str, Any] | None:
        return {"trigger": "fixed", "step": self.step} if step >= self.step else None

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        return


class Never:
    """Alignment to the end, as in REPA."""

    def known_step(self) -> int | None:
        return None

    def evidence(self, step: int) -> dict[str, Any] | None:
        return None

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        return


def make_trigger(config: TerminationConfig | None) -> Trigger:
    """The trigger that a config names; None never terminates."""
    return Never() if config is None else FixedStepTrigger(config)
