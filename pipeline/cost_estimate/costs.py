"""The arithmetic of a plan: bytes, FLOPs, rates and prices to what every cut costs. No torch.

One word for all devices: a device is what one worker has, a GPU or the cores that were timed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

HOUR = 3600.0
TERA = 1e12
GIGA = 1e9


@dataclass(frozen=True)
class Work:
    """FLOPs of one image, by place. The mappings are by cut."""

    step: int
    """A vanilla training step."""
    alignment: int
    """What projector and the student's tapped logits add to it, whatever the cut."""
    autoencoder: int
    extraction: dict[str, int]
    """The teacher, in the extraction."""
    training: dict[str, int]
    """The teacher, in the trainer."""
    tail_weights: dict[str, int]
    """Number of weights of the teacher's part that the trainer runs."""
    tail_blocks: dict[str, int]
    """Its blocks."""


@dataclass(frozen=True)
class Rates:
    """What one device sustains."""

    teacher: float
    """FLOP per second."""
    autoencoder: float
    student: float
    decode_seconds: float
    """To decode and crop one image, with all the decoding threads of an encoder."""
    decode_beside: bool
    """Whether decoding runs beside the networks (on a GPU) or takes cores from them."""


@dataclass(frozen=True)
class Demand:
    """How much of everything, and its price."""

    images: int
    aligned_images: int
    """Images that one run sees before the termination."""
    run_images: int
    """Images that one run sees in all."""
    encoders: float
    """Devices of the extraction."""
    trainers: int
    """Devices of the training."""
    bytes_per_second: float
    """That one worker can read, and one encoder write."""
    device_hour: float
    tb_month: float
    months: float
    runs: int


@dataclass(frozen=True)
class Stored:
    """One way to store the teacher."""

    cut: str
    codec: str
    bytes_per_image: int
    """Latents included, since they are read together."""
    exists: bool = False
    """The store has been made: its extraction is paid for."""
    candidate: bool = True
    """Whether it may be recommended; the others, in codecs that were not chosen, are shown only."""


@dataclass(frozen=True)
class Cost:
    """What one way to store the teacher costs."""

    stored: Stored
    store_bytes: int
    """Images and the teacher's tail."""
    extraction_device_hours: float
    extraction_hours: float
    """On the given encoders."""
    teacher_share: float
    """Teacher's time in the trainer, of a vanilla step's."""
    read_needed: float
    """Bytes per second and worker, for the trainer not to wait."""
    wait_share: float
    """Time spent waiting for bytes in Phase I, of a vanilla step's."""
    run_device_hours: float
    """What teacher and waiting add to one run."""
    storage_per_month: float
    once: float
    """Price of extraction and storage."""
    per_run: float
    """Price of ``run_device_hours``."""
    total: float
    """Price for all runs."""
    break_even_runs: int | None
    """Runs from which on it is cheaper than the online teacher; None: never."""

    @property
    def waits(self) -> bool:
        """Whether reading, not arithmetic, decides the pace."""
        return self.wait_share > 0


def cost_of(stored: Stored, work: Work, rates: Rates, demand: Demand) -> Cost:
    """Without ``break_even_runs``, which takes two."""
    cut = stored.cut
    store_bytes = demand.images * stored.bytes_per_image + 4 * work.tail_weights[cut]

    networks = work.autoencoder / rates.autoencoder + work.extraction[cut] / rates.teacher
    decode = rates.decode_seconds
    encode = max(networks, decode) if rates.decode_beside else networks + decode
    encode += stored.bytes_per_image / demand.bytes_per_second  # shards are written in between
    device_hours = 0.0 if stored.exists else demand.images * encode / HOUR

    step = work.step / rates.student
    teacher = work.training[cut] / rates.teacher
    compute = step + work.alignment / rates.student + teacher
    wait = max(0.0, stored.bytes_per_image / demand.bytes_per_second - compute)
    run_hours = demand.aligned_images * (teacher + wait) / HOUR

    per_month = store_bytes / TERA * demand.tb_month
    once = device_hours * demand.device_hour + per_month * demand.months
    per_run = run_hours * demand.device_hour
    return Cost(
        stored=stored,
        store_bytes=store_bytes,
        extraction_device_hours=device_hours,
        extraction_hours=device_hours / demand.encoders,
        teacher_share=teacher / step,
        read_needed=stored.bytes_per_image / compute,
        wait_share=wait / step,
        run_device_hours=run_hours,
        storage_per_month=per_month,
        once=once,
        per_run=per_run,
        total=once + demand.runs * per_run,
        break_even_runs=None,
    )


def break_even_runs(once: float, per_run: float, other_once: float, other_per_run: float) -> int:
    """The least number of runs, 1 or more, from which on the first costs less than the other,
    however many more there are; 0 where there is none."""
    saved = other_per_run - per_run
    if saved <= 0:
        return int(saved == 0 and once < other_once)
    runs = max(1, math.floor((once - other_once) / saved))
    while once + runs * per_run >= other_once + runs * other_per_run:
        runs += 1  # once or twice: it must be less, and the division was rounded
    return runs


def full_run_hours(work: Work, rates: Rates, demand: Demand) -> float:
    """Device-hours of one run with targets that cost nothing."""
    flops = demand.run_images * work.step + demand.aligned_images * work.alignment
    return flops / rates.student / HOUR
