"""Costs of a teacher store from bytes, FLOPs, rates and prices. No torch.

A device is the hardware of one worker: a GPU, or the CPU cores that were timed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

HOUR = 3600.0
TERA = 1e12
GIGA = 1e9
ONLINE = "image"
"""The cut of the online baseline: crops are stored, and the trainer runs the whole teacher."""


@dataclass(frozen=True)
class ImageFlops:
    """FLOPs per image. The mappings are by cut."""

    step: int
    """A vanilla training step."""
    alignment: int
    """The projector and the student's tapped logits, the same for every cut."""
    autoencoder: int
    extraction: dict[str, int]
    """The teacher, in the extraction."""
    training: dict[str, int]
    """The teacher, in the trainer."""
    tail_weights: dict[str, int]
    """Number of teacher weights that the trainer needs."""


@dataclass(frozen=True)
class DeviceRates:
    """Sustained rates of one device, in FLOP per second."""

    teacher: float
    autoencoder: float
    student: float
    decode_seconds: float
    """Seconds to decode and crop one image, using all decoding threads of an encoder."""
    decode_overlaps: bool
    """True if decoding overlaps with the networks (GPU), false if both use the same cores."""


@dataclass(frozen=True)
class Scenario:
    """Amounts and prices of an estimate."""

    images: int
    aligned_images_per_run: int
    """Images of one run before the termination."""
    images_per_run: int
    encoders: float
    """Devices of the extraction."""
    workers: int
    """Devices of the training."""
    bytes_per_second_per_worker: float
    """Read rate of one worker and write rate of one encoder."""
    device_hour: float
    """Price, as ``tb_month``."""
    tb_month: float
    months: float
    runs: int


@dataclass(frozen=True)
class StoreLayout:
    """A cut and codec for the teacher, and its size."""

    cut: str
    codec: str
    bytes_per_image: int
    """Teacher and latents, because they are read together."""
    exists: bool = False
    """The store is complete: its extraction costs nothing more."""
    candidate: bool = True
    """False for a codec that was not requested: shown for comparison, never recommended."""


@dataclass(frozen=True)
class Cost:
    """Costs of one layout; the fields of one row of ``--json``."""

    cut: str
    codec: str
    exists: bool
    candidate: bool
    bytes_per_image: int
    bytes: int
    """All images and the teacher's tail."""
    extraction_device_hours: float
    extraction_hours: float
    """With the scenario's number of encoders."""
    read_bytes_per_second_per_worker: int
    """Rate at which the trainer does not wait."""
    read_bytes_per_second: int
    """The same for all workers."""
    bandwidth_suffices: bool
    """False if the trainer is limited by reading."""
    teacher_flops_per_image: int
    """In the trainer."""
    teacher_share_of_step: float
    """Teacher time in the trainer, relative to a vanilla step."""
    wait_share_of_step: float
    """Time waiting for data in Phase I, relative to a vanilla step."""
    device_hours_per_run: float
    """Added to one run by teacher and waiting."""
    storage_cost_per_month: float
    cost_once: float
    """Extraction and storage."""
    cost_per_run: float
    """Price of ``device_hours_per_run``."""
    cost: float
    """All runs."""
    break_even_runs: int | None = None
    """Smallest number of runs from which it is cheaper than the online teacher; None: never."""

    @property
    def name(self) -> str:
        return f"'{self.cut}' in {self.codec}" + (" (this store)" if self.exists else "")


def compare_layouts(
    layouts: Sequence[StoreLayout], flops: ImageFlops, rates: DeviceRates, scenario: Scenario
) -> tuple[Cost, ...]:
    """Cost of every layout. At least one of them has the cut ``image``."""
    costs = [cost_of(layout, flops, rates, scenario) for layout in layouts]
    online = cheapest_online(costs)
    return tuple(
        cost if cost.cut == ONLINE else replace(cost, break_even_runs=_break_even(cost, online))
        for cost in costs
    )


def cheapest_online(costs: Sequence[Cost]) -> Cost:
    """Cheapest layout with the cut ``image``."""
    return min((c for c in costs if c.cut == ONLINE), key=lambda cost: cost.cost)


def recommended(costs: Sequence[Cost]) -> Cost:
    """Cheapest candidate. A coarser codec is never chosen for its price alone."""
    return min((c for c in costs if c.candidate), key=lambda cost: cost.cost)


def cost_of(layout: StoreLayout, flops: ImageFlops, rates: DeviceRates, scenario: Scenario) -> Cost:
    """Cost without ``break_even_runs``, which needs the online baseline."""
    cut = layout.cut
    store_bytes = scenario.images * layout.bytes_per_image + 4 * flops.tail_weights[cut]
    transfer = layout.bytes_per_image / scenario.bytes_per_second_per_worker

    networks = flops.autoencoder / rates.autoencoder + flops.extraction[cut] / rates.teacher
    decode = rates.decode_seconds
    encode = max(networks, decode) if rates.decode_overlaps else networks + decode
    encode += transfer  # writing a shard does not overlap with encoding
    device_hours = 0.0 if layout.exists else scenario.images * encode / HOUR

    step = flops.step / rates.student
    teacher = flops.training[cut] / rates.teacher
    compute = step + flops.alignment / rates.student + teacher
    wait = max(0.0, transfer - compute)
    run_hours = scenario.aligned_images_per_run * (teacher + wait) / HOUR

    per_month = store_bytes / TERA * scenario.tb_month
    once = device_hours * scenario.device_hour + per_month * scenario.months
    per_run = run_hours * scenario.device_hour
    return Cost(
        **asdict(layout),
        bytes=store_bytes,
        extraction_device_hours=device_hours,
        extraction_hours=device_hours / scenario.encoders,
        read_bytes_per_second_per_worker=round(layout.bytes_per_image / compute),
        read_bytes_per_second=round(layout.bytes_per_image / compute * scenario.workers),
        bandwidth_suffices=wait == 0,
        teacher_flops_per_image=flops.training[cut],
        teacher_share_of_step=teacher / step,
        wait_share_of_step=wait / step,
        device_hours_per_run=run_hours,
        storage_cost_per_month=per_month,
        cost_once=once,
        cost_per_run=per_run,
        cost=once + scenario.runs * per_run,
    )


def _break_even(cost: Cost, online: Cost) -> int | None:
    return break_even_runs(cost.cost_once, cost.cost_per_run, online.cost_once, online.cost_per_run)


def break_even_runs(
    once: float, per_run: float, other_once: float, other_per_run: float
) -> int | None:
    """Smallest number of runs, at least 1, from which the first stays cheaper than the other;
    None if there is no such number."""
    saved = other_per_run - per_run
    if saved <= 0:
        return 1 if saved == 0 and once < other_once else None
    runs = max(1, math.floor((once - other_once) / saved))
    while once + runs * per_run >= other_once + runs * other_per_run:
        runs += 1  # at most twice: the division is rounded down, and the cost must be lower
    return runs
