"""Costs of a teacher store from bytes, FLOPs, rates and prices.

A device is the hardware of one worker: a GPU, or the CPU cores that were timed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from pipeline.cost_estimate.meta_models import Geometry
from pipeline.store.arrays import stream_parts
from pipeline.store.codecs import find_codec
from pipeline.targets.cuts import class_columns, cut_columns
from schemas.codecs import CodecSet
from schemas.extract import Cut, TextConfig
from schemas.streams import Column

CALIBRATION_PASSES = 7
"""Passes of a calibration through the later blocks: a check, 3 to 5 steps, the gradients."""

HOUR = 3600.0
TERA = 1e12
GIGA = 1e9
ONLINE = "image"
"""The cut of the online baseline: crops are stored, and the trainer runs the whole teacher."""
TAR_BLOCK = 512
NPY_HEADER = 128
USUAL_CAPTION = 53
"""UTF-8 bytes of a caption of MS-COCO."""


@dataclass(frozen=True)
class ImageFlops:
    """FLOPs per image. The mappings are by cut."""

    step: int  # a vanilla training step
    alignment: int  # the projector and the student's tapped logits, the same for every cut
    autoencoder: int
    extraction: dict[str, int]  # the teacher, in the extraction
    training: dict[str, int]  # the teacher, in the trainer
    tail_weights: dict[str, int]  # number of teacher weights in the trainer; none for other cuts


@dataclass(frozen=True)
class DeviceRates:
    """Sustained rates of one device, in FLOP per second."""

    teacher: float
    autoencoder: float
    student: float
    decode_seconds: float  # to decode and crop one image with all decoding threads of an encoder
    decode_overlaps: bool  # with the networks (GPU); False where both use the same cores


@dataclass(frozen=True)
class Scenario:
    """Amounts and prices of an estimate."""

    images: int
    aligned_images_per_run: int  # before the termination
    images_per_run: int
    encoders: float  # devices of the extraction
    workers: int  # devices of the training
    bytes_per_second_per_worker: float  # read rate of one worker, write rate of one encoder
    device_hour: float  # price, as tb_month
    tb_month: float
    months: float
    runs: int


@dataclass(frozen=True)
class StoreLayout:
    """A cut and codec for the teacher, and its size."""

    cut: str
    codec: str
    bytes_per_image: int  # teacher and latents, because they are read together
    class_bytes: int = 0  # per image, of the class stream: only recipes such as REG read it
    exists: bool = False  # a complete store: its extraction costs nothing more
    candidate: bool = True  # False: a codec for comparison only, never recommended


@dataclass(frozen=True, kw_only=True)
class Cost(StoreLayout):
    """Costs of one layout; the fields of one row of ``--json``. Shares are of a vanilla step."""

    bytes: int  # all images and the teacher's tail
    extraction_device_hours: float
    extraction_hours: float  # with the scenario's number of encoders
    read_bytes_per_second_per_worker: int  # rate at which the trainer does not wait
    read_bytes_per_second: int  # the same for all workers
    bandwidth_suffices: bool  # False if the trainer is limited by reading
    teacher_flops_per_image: int  # in the trainer
    teacher_share_of_step: float  # teacher time in the trainer
    wait_share_of_step: float  # time waiting for data in Phase I
    device_hours_per_run: float  # added to one run by teacher and waiting
    storage_cost_per_month: float
    cost_once: float  # extraction and storage
    cost_per_run: float  # price of device_hours_per_run
    cost: float  # all runs
    break_even_runs: int | None = None
    """Smallest number of runs from which it is cheaper than the online teacher; None: never."""

    @property
    def name(self) -> str:
        return f"'{self.cut}' in {self.codec}" + (" (this store)" if self.exists else "")


def stored_bytes(cut: Cut, codec: CodecSet, geometry: Geometry, *, compress: bool = True) -> int:
    """Bytes per image of the teacher stream, without the latents (``latent_bytes``)."""
    return _stream_bytes(cut_columns(cut, geometry, geometry.resolution, codec, compress=compress))


def caption_bytes(
    config: TextConfig, size: tuple[int, int], captions: float, *, compress: bool = True
) -> int:
    """Bytes per image of its captions, on average ``captions``, as ``config`` keeps them; ``size``
    is that of ``encoder_size``."""
    tokens, width = size
    if config.keep == "none":
        return 0
    embeds = config.keep != "tokens"
    codec = config.codec if embeds else "int64"
    found, shape = find_codec(codec), (tokens, width) if embeds else (tokens,)
    lossless = found.lossless if compress else "none"
    one = _stream_bytes({"caption": Column(shape=shape, codec=codec, lossless=lossless)})
    if not embeds and compress:
        one = 2 * TAR_BLOCK  # ids and the repeated padding
    lengths = Column(shape=(max(1, round(captions)),), codec="int64")
    texts = Column(shape=(round(captions * USUAL_CAPTION),), codec="uint8")
    return round(captions * one) + _stream_bytes({"lengths": lengths, "text": texts})


def class_stream_bytes(codec: CodecSet, geometry: Geometry, *, compress: bool = True) -> int:
    """Bytes per image of the class stream."""
    return _stream_bytes(class_columns(geometry.width, codec, compress=compress))


def latent_bytes(geometry: Geometry) -> int:
    """Bytes per image of mean and std in float16, and of the label."""
    latent = Column(shape=geometry.latent_shape, codec="float16")
    label = Column(shape=(), codec="int64")
    return _stream_bytes({"mean": latent, "std": latent, "label": label})


def _stream_bytes(columns: dict[str, Column]) -> int:
    """Tar members of one image: header, .npy header, data (compressed: estimated), padding."""
    total = 0
    for name, part in stream_parts(columns).items():
        column = columns[name.partition(".")[0]]
        estimated = part.lossless != "none" or part.trimmed
        bits = find_codec(column.codec).bits_per_value if estimated else None
        size = part.nbytes if bits is None else math.prod(column.shape) * bits / 8
        data = 3 if part.is_class else NPY_HEADER + round(size)
        total += TAR_BLOCK * (1 - -data // TAR_BLOCK)
    return total


def compare_layouts(
    layouts: Sequence[StoreLayout], flops: ImageFlops, rates: DeviceRates, scenario: Scenario
) -> tuple[Cost, ...]:
    """Cost of every layout. At least one of them has the cut ``image``."""
    costs = [cost_of(layout, flops, rates, scenario) for layout in layouts]
    online = cheapest(costs, online=True)
    other = online.cost_once, online.cost_per_run
    return tuple(
        cost
        if cost.cut == ONLINE
        else replace(
            cost, break_even_runs=break_even_runs(cost.cost_once, cost.cost_per_run, *other)
        )
        for cost in costs
    )


def cheapest(costs: Sequence[Cost], *, online: bool | None = None) -> Cost:
    """Cheapest candidate with the online cut, with another cut, or (None) of all. A coarser codec
    is never chosen for its price alone."""
    return min(
        (c for c in costs if c.candidate and online in (None, c.cut == ONLINE)),
        key=lambda cost: cost.cost,
    )


def cost_of(layout: StoreLayout, flops: ImageFlops, rates: DeviceRates, scenario: Scenario) -> Cost:
    """Cost without ``break_even_runs``, which needs the online baseline."""
    cut = layout.cut
    stored = layout.bytes_per_image + layout.class_bytes
    store_bytes = scenario.images * stored + 4 * flops.tail_weights.get(cut, 0)
    transfer = layout.bytes_per_image / scenario.bytes_per_second_per_worker

    networks = flops.autoencoder / rates.autoencoder + flops.extraction[cut] / rates.teacher
    decode = rates.decode_seconds
    encode = max(networks, decode) if rates.decode_overlaps else networks + decode
    # writing a shard does not overlap with encoding
    encode += stored / scenario.bytes_per_second_per_worker
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
