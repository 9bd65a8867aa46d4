"""Plan of a run's faults: a pure function of the seed and the run's number."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple

from tests.faults.environments import ENVIRONMENTS, Environment
from tests.faults.faults import FAULTS, Fault
from tests.faults.workloads import Extraction, Training, Workload

MIN_AND_MAX = {Extraction: (2, 4), Training: (3, 6)}
"""Least and most faults in one run; starting a training takes longer than recovery."""
LAST = 0.8
"""Share of the work after which no fault is injected, because the work could end before it."""


class Injection(NamedTuple):
    fault: str
    at: int
    """Progress at which it is injected."""
    delay: float
    """Seconds between that progress and the injection."""


class Plan(NamedTuple):
    number: int
    work: type[Workload]
    environment: str
    injections: tuple[Injection, ...]
    salt: int
    """Seed of the choice of targets."""


def draw(seed: int, number: int, kinds: Sequence[str]) -> Plan:
    """Plan of run ``number``. Its first fault is drawn uniformly from ``kinds`` and determines the
    environment; the others are drawn from those available there."""
    rng = random.Random(f"{seed} {number}")
    faults = [FAULTS[kind] for kind in sorted(kinds)]
    first = rng.choice(faults)
    work = rng.choice(first.works)
    environment = first.environment or rng.choice(
        sorted(_environments_of(faults, work), key=lambda e: e.name)
    )
    fitting = [f for f in faults if work in f.works and f.environment in (None, environment)]
    chosen = [first]
    for _ in range(rng.randint(*MIN_AND_MAX[work]) - 1):
        others = [f for f in fitting if not (f.once and f in chosen)]
        if others:
            chosen.append(rng.choice(others))
    rng.shuffle(chosen)
    return Plan(
        number, work, environment.name, _injections(rng, work, chosen), salt=rng.randrange(1 << 32)
    )


def _environments_of(faults: Sequence[Fault], work: type[Workload]) -> set[type[Environment]]:
    """Environments for a fault that is not bound to one: the disk, where a run is cheapest, and
    those of other faults of this workload."""
    own = {f.environment for f in faults if f.environment is not None and work in f.works}
    return {ENVIRONMENTS["disk"], *own}


def _injections(
    rng: random.Random, work: type[Workload], faults: Sequence[Fault]
) -> tuple[Injection, ...]:
    """Spread over the work: one injection in each of equal intervals."""
    end = int(work.total * LAST)
    interval = end // len(faults)
    injections = []
    for number, fault in enumerate(faults):
        at = rng.randint(1, interval) + number * interval
        injections.append(
            Injection(fault.name, max(at, fault.earliest), round(rng.uniform(0, 0.3), 3))
        )
    return tuple(injections)
