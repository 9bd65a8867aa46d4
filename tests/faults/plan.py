"""Which faults come in a run: a pure function of the seed and the run's number."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple

from tests.faults.faults import FAULTS, Fault
from tests.faults.habitats import HABITATS, Habitat
from tests.faults.work import Extraction, Training, Work

MIN_AND_MAX = {Extraction: (2, 4), Training: (3, 6)}
"""Faults in one run: to start a training takes longer than to recover."""
LAST = 0.8
"""Share of the work after which no fault comes: it could be over before."""


class Moment(NamedTuple):
    fault: str
    at: int
    """Progress from which on it comes."""
    delay: float
    """Seconds that it waits then."""


class Plan(NamedTuple):
    number: int
    work: type[Work]
    habitat: str
    moments: tuple[Moment, ...]
    salt: int
    """Decides what the faults hit."""


def draw(seed: int, number: int, kinds: Sequence[str]) -> Plan:
    """Run ``number``. Its first fault is any of ``kinds`` with equal chance and decides where the
    run lives; the others are such as can be made there."""
    rng = random.Random(f"{seed} {number}")
    faults = [FAULTS[kind] for kind in sorted(kinds)]
    first = rng.choice(faults)
    work = rng.choice(first.works)
    habitat = first.habitat or rng.choice(sorted(_homes(faults, work), key=lambda h: h.name))
    fitting = [f for f in faults if work in f.works and f.habitat in (None, habitat)]
    chosen = [first]
    for _ in range(rng.randint(*MIN_AND_MAX[work]) - 1):
        others = [f for f in fitting if not (f.once and f in chosen)]
        if others:
            chosen.append(rng.choice(others))
    rng.shuffle(chosen)
    return Plan(
        number, work, habitat.name, _moments(rng, work, chosen), salt=rng.randrange(1 << 32)
    )


def _homes(faults: Sequence[Fault], work: type[Work]) -> set[type[Habitat]]:
    """Where a fault that can be made anywhere is made: on a disk, mostly, as a run there is
    cheapest."""
    own = {f.habitat for f in faults if f.habitat is not None and work in f.works}
    return {HABITATS["disk"], *own}


def _moments(rng: random.Random, work: type[Work], faults: Sequence[Fault]) -> tuple[Moment, ...]:
    """Spread over the work, each within a stretch of its own."""
    end = int(work.total * LAST)
    stretch = end // len(faults)
    moments = []
    for number, fault in enumerate(faults):
        at = rng.randint(1, stretch) + number * stretch
        moments.append(Moment(fault.name, max(at, fault.earliest), round(rng.uniform(0, 0.3), 3)))
    return tuple(moments)
