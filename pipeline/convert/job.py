"""A conversion, from options to a complete store."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from pipeline.cli.progress import progress_bar
from pipeline.convert.converters import Converter, open_converter
from pipeline.convert.request import open_source
from pipeline.convert.shard import Group, convert_shard
from pipeline.convert.streams import StreamPlan, computed_stream, plan_streams
from pipeline.precision import choose_device
from pipeline.storage.files import exists
from pipeline.store import Store
from pipeline.store.captions import read_null, write_null
from pipeline.store.layout import INDEX
from pipeline.store.manifest_diff import check_same_conversion
from pipeline.targets.tail import (
    copy_tail,
    describe_copy,
    describe_tail,
    first_tail_block,
    load_tail,
    save_tail,
)
from pipeline.teachers import Teacher
from schemas.convert import ConvertConfig
from schemas.errors import UserError
from schemas.networks import WeightsFile
from schemas.store import Manifest, StoreIndex
from schemas.streams import TeacherStream, TextStream


@dataclass(frozen=True)
class Conversion:
    """Result of a conversion."""

    store: Store
    shards: int
    """Shards committed by this call, counted per group of streams; 0 if none was missing."""
    bytes_before: float
    """Bytes per image of the converted streams in the source."""
    bytes_after: float


def convert(config: ConvertConfig) -> Conversion:
    """Create or complete the target that ``config`` describes. Raises ``UserError``."""
    source, url = open_source(config)
    plans = plan_streams(config, source)
    source.require_complete("latents", *(plan.source for plan in plans if plan.added))
    device = _device(config, plans)
    wanted = _manifest(config, source.manifest, plans, device)
    existing = Store.open(url) if Store.exists(url) else None
    if existing is not None:
        check_same_conversion(existing.manifest, wanted, existing.shown_url)
    target, shards = existing, 0
    groups = _groups(plans)
    if existing is None or _lacks(existing, groups):
        with one_thread_each():
            tails = {plan.name: _load(source, plan).to(device) for plan in plans if plan.replays}
            target = _open_target(source, url, wanted, existing, plans, tails)
            converters = {p.name: open_converter(p, tails.get(p.name), device) for p in plans}
            shards = convert_missing(source, target, groups, converters, config.workers)
        target.finish()
    assert target is not None
    if not exists(target.filesystem, f"{target.root}/{INDEX}"):
        target.finish()
    return Conversion(
        target,
        shards,
        _bytes_per_image(source.index(), [plan.source for plan in plans]),
        _bytes_per_image(target.index(), [plan.name for plan in plans]),
    )


def _device(config: ConvertConfig, plans: Sequence[StreamPlan]) -> torch.device:
    device = torch.device(choose_device(config.device))
    for plan in plans:
        if plan.replays:
            require_precision(plan, device)
    return device


def require_precision(plan: StreamPlan, device: torch.device) -> None:
    """Raises ``UserError`` where blocks of the teacher cannot be run on ``device`` with the
    precision of the extraction."""
    if device.type == "cpu" and plan.before.compute.precision == "float16":
        raise UserError(
            f"stream '{plan.source}' was extracted in float16, which needs a GPU: run the "
            "conversion on a machine with one"
        )


def _manifest(
    config: ConvertConfig, before: Manifest, plans: Sequence[StreamPlan], device: torch.device
) -> Manifest:
    """The target's manifest without new tails. Skipped images are added when it is complete."""
    format = config.format or before.format
    streams = {plan.name: computed_stream(plan, device, format) for plan in plans}
    return before.model_copy(update={"format": format, "streams": streams, "skipped": ()})


def _groups(plans: Sequence[StreamPlan]) -> list[Group]:
    base = Group(None, [plan for plan in plans if not plan.added])
    return [base, *(Group(plan.name, [plan]) for plan in plans if plan.added)]


def _lacks(target: Store, groups: Sequence[Group]) -> bool:
    """True if a shard, a teacher's tail or a null caption is missing."""
    files = target.manifest.weights_files.values()
    return any(target.missing_shards(group.added or "latents") for group in groups) or any(
        not _file_exists(target, file) for file in files
    )


def _load(source: Store, plan: StreamPlan) -> Teacher:
    assert isinstance(plan.after, TeacherStream)
    return load_tail(source, plan.source, plan.after.teacher.layers)


def _open_target(
    source: Store,
    url: str,
    wanted: Manifest,
    existing: Store | None,
    plans: Sequence[StreamPlan],
    tails: dict[str, Teacher],
) -> Store:
    """The target with its manifest and tails written, ready for shards. The manifest comes first,
    and is compared even if it is new: of two commands that start at once, one writes it."""
    is_new = existing is None
    if existing is None:
        streams = dict(wanted.streams)
        for plan in plans:
            if isinstance(plan.after, TeacherStream):
                tail = _tail(source, plan, tails.get(plan.name))
                streams[plan.name] = streams[plan.name].model_copy(update={"tail": tail})
        existing = Store.create(url, wanted.model_copy(update={"streams": streams}))
        check_same_conversion(existing.manifest, wanted, existing.shown_url)
    for plan in plans:
        stream = existing.manifest.streams[plan.name]
        if isinstance(stream, TextStream):
            if is_new or not _file_exists(existing, stream.null):
                write_null(existing, plan.name, read_null(source, plan.source))
            continue
        was = stream.tail if isinstance(stream, TeacherStream) else None
        if was is None or (not is_new and _file_exists(existing, was)):
            continue
        if _tail(source, plan, tails.get(plan.name), write_to=url) != was:
            raise UserError(
                f"store '{existing.shown_url}' was made with another tail of the teacher of "
                f"stream '{plan.name}', and has lost it: name another target"
            )
    return existing


def _file_exists(store: Store, file: WeightsFile) -> bool:
    return exists(store.filesystem, f"{store.root}/{file.file}")


def _tail(
    source: Store, plan: StreamPlan, teacher: Teacher | None, *, write_to: str | None = None
) -> WeightsFile | None:
    """The file of the target's tail, None if the stream has none; written to a store if given."""
    assert isinstance(plan.before, TeacherStream)
    assert isinstance(plan.after, TeacherStream)
    first = first_tail_block(plan.after.cut, plan.after.teacher.layers)
    if first is None or plan.before.tail is None:
        return None
    if teacher is None or teacher.first_block == first:
        if write_to is None:
            return describe_copy(source, plan.source, plan.name)
        return copy_tail(source, plan.source, write_to, plan.name)
    if write_to is None:
        return describe_tail(teacher, plan.name, first)
    return save_tail(teacher, write_to, plan.name, first)


def convert_missing(
    source: Store,
    target: Store,
    groups: Sequence[Group],
    converters: Mapping[str, Converter],
    workers: int | None = None,
) -> int:
    """Convert missing shards, several at a time, by the converter of each stream of the target.
    Returns their number."""
    tasks = [
        (group, shard)
        for group in groups
        for shard in target.missing_shards(group.added or "latents")
    ]
    samples = source.index().samples_per_shard
    stop = threading.Event()
    workers = workers or min(8, os.cpu_count() or 1)
    with (
        progress_bar(
            total=sum(samples[shard] for _, shard in tasks),
            unit="image",
            desc="convert",
        ) as bar,
        ThreadPoolExecutor(workers, "convert", lambda: torch.set_num_threads(1)) as pool,
    ):
        try:
            futures = [
                pool.submit(convert_shard, source, target, group, shard, converters, stop)
                for group, shard in tasks
            ]
            for future in as_completed(futures):
                bar.update(future.result())
        except BaseException:  # KeyboardInterrupt too
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise
    return len(tasks)


@contextmanager
def one_thread_each() -> Iterator[None]:
    """One arithmetic thread per worker, because the number of threads changes the last bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _bytes_per_image(index: StoreIndex, streams: Sequence[str]) -> float:
    """Bytes per image of these streams."""
    total = sum(index.bytes_per_stream[name] for name in streams)
    return total / max(1, sum(index.samples_per_shard))
