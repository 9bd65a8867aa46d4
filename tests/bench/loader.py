"""The loader on one core against reading the same bytes, and against stock webdataset."""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from itertools import islice
from typing import Any

import numpy as np

from pipeline.store import BatchLoader, SampleOrder, Store
from pipeline.store.reading.shard_index import shard_table
from schemas.errors import UserError
from tests.bench.checkouts import run_in
from tests.bench.options import LoaderOptions as Options
from tests.bench.read_methods import data_files, samples_of, stock_webdataset
from tests.bench.report import Heading, Report, Table
from tests.bench.synthetic_stores import (
    STORE_SPECS,
    TINY,
    dinov2_b,
    make_manifest,
    make_samples,
    write_store,
)
from tests.stores import add_text_stream

HEADINGS = (
    Heading("way", "way"),
    Heading("mb_s", "MB/s", ".0f"),
    Heading("samples_s", "samples/s", ".0f"),
    Heading("microseconds", "CPU us a sample", ".0f"),
    Heading("of_raw", "of readinto", ".2f"),
    Heading("of_webdataset", "of stock webdataset", ".2f"),
    Heading("waits", "waiting", ".2%"),
)
BASELINE = (Heading("of_baseline", "of baseline", ".2f"),)
ALIVE = 4
"""Batches in memory at once: two prefetched, the current one and its successor."""
SPEC_NAMES = (*STORE_SPECS, "tiny")
RAW, STOCK = "one readinto per file", "stock webdataset .decode()"
BARE = "one preadv per sample"
QUICK, WHOLE = "loader, checksums off", "loader"


CAPTION_SHAPE, CAPTIONS = (77, 768), 5
"""Embedding of CLIP ViT-L/14, and captions of an image of MS-COCO."""
CAPTION_HEADINGS = (
    Heading("way", "streams"),
    Heading("microseconds", "CPU us a sample", ".0f"),
    Heading("bytes", "bytes a sample", ".0f"),
    Heading("share", "of a core at the rate", ".2%"),
    Heading("waits", "waiting", ".2%"),
)


def run(options: Options) -> Report:
    if options.streams:
        return measure_captions(options)
    tables = []
    with tempfile.TemporaryDirectory(prefix="haste-bench-") as folder:
        for name in options.forms:
            spec = TINY if name == "tiny" else STORE_SPECS[name]
            manifest = make_manifest(spec, "webdataset", dinov2_b())
            url = f"{folder}/{name.replace(' ', '-')}"
            store = write_store(url, manifest, make_samples(manifest))
            with one_core():
                table = Table(name, HEADINGS, measure(store, options))
            for row in table.rows:
                if row["way"] == WHOLE:
                    row["waits"] = waiting_share(store, options)
            if options.baseline is not None:
                theirs = baseline_rows(name, options)
                speeds = {row["way"]: row["samples_s"] for row in theirs}
                for row in table.rows:
                    if f"{row['way']}, baseline" in speeds:
                        row["of_baseline"] = row["samples_s"] / speeds[f"{row['way']}, baseline"]
                rows = [*table.rows, *theirs]
                table = Table(name, (*HEADINGS, *BASELINE), rows)
            tables.append(table)
    first = {row["way"]: row for row in tables[0].rows}
    headline = {
        "over_raw_read": first[QUICK]["of_raw"],
        "over_raw_read_checksums_on": first[WHOLE]["of_raw"],
        "over_webdataset_decode": first[WHOLE]["of_webdataset"],
        "waiting_share": first[WHOLE]["waits"],
    }
    return Report({"clock": "CPU seconds, one core", "batch": options.batch}, tables, headline)


def measure_captions(options: Options) -> Report:
    """CPU time of a sample's streams with and without captions, and the waiting of a step."""
    name = options.forms[0]
    spec = TINY if name == "tiny" else STORE_SPECS[name]
    with tempfile.TemporaryDirectory(prefix="haste-bench-") as folder:
        manifest = make_manifest(spec, "webdataset", dinov2_b())
        store = write_store(f"{folder}/store", manifest, make_samples(manifest))
        store = add_text_stream(store, shape=CAPTION_SHAPE, captions=CAPTIONS, lossless="zstd")
        text = set(options.streams) & set(store.manifest.text_streams)
        unknown = set(options.streams) - set(store.manifest.streams)
        if unknown or not text:
            held = ", ".join(store.manifest.streams)
            raise UserError(f"--streams names some of {held}, text among them")
        others = tuple(stream for stream in options.streams if stream not in text)
        seconds: dict[tuple[str, ...], list[float]] = {others: [], options.streams: []}
        read = {}
        with one_core():
            for number in range(options.rounds + 1):
                for streams, times in seconds.items():
                    start = time.process_time()
                    loader, batch = open_loader(
                        store, options, verify=True, streams=streams, epochs=1
                    )
                    batches = islice(loader, samples_of(store) // batch)
                    count = sum(len(one.positions) for one in batches)
                    loader.close()
                    read[streams] = sum(loader.bytes_read.values()) / count
                    if number:  # the first round warms up
                        times.append((time.process_time() - start) / count)
        rows: list[dict[str, Any]] = [
            {
                "way": ",".join(streams),
                "microseconds": statistics.median(times) * 1e6,
                "bytes": read[streams],
                "share": statistics.median(times) * options.rate,
                "waits": waiting_share(store, options, streams),
            }
            for streams, times in seconds.items()
        ]
    differences = [b - a for a, b in zip(*seconds.values(), strict=True)]
    headline = {
        "text_microseconds": statistics.median(differences) * 1e6,
        "text_bytes": rows[1]["bytes"] - rows[0]["bytes"],
        "text_waiting_share": rows[1]["waits"] - rows[0]["waits"],
    }
    about = {
        "clock": "CPU seconds, one core",
        "batch": options.batch,
        "step": f"{options.rate:g} samples a second",
    }
    return Report(about, [Table(name, CAPTION_HEADINGS, rows)], headline)


def baseline_rows(form: str, options: Options) -> list[dict[str, Any]]:
    """The loader of another checkout on a store that it writes."""
    assert options.baseline is not None
    arguments = ["-m", "tests.bench", "loader", "--json", "--forms", form, "--seconds", "0.1"]
    arguments += ["--rounds", str(options.rounds), "--batch", str(options.batch)]
    report = run_in(options.baseline.resolve(), arguments)
    (theirs,) = report["tables"].values()
    return [
        {
            "way": f"{row['way']}, baseline",
            "microseconds": 1e6 / row["samples_s"],
            **{name: row[name] for name in ("mb_s", "samples_s", "of_raw")},
        }
        for row in theirs
        if row["way"] in {RAW, QUICK, WHOLE}
    ]


def measure(store: Store, options: Options) -> list[dict[str, Any]]:
    methods: dict[str, Callable[[Store], int]] = {
        RAW: read_files,
        BARE: lambda s: read_rows(s, options),
        QUICK: lambda s: load(s, options, verify=False),
        WHOLE: lambda s: load(s, options, verify=True),
        STOCK: stock_webdataset,
    }
    stored = sum(store.index().bytes_per_stream.values())
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    for number in range(options.rounds + 1):
        for name, method in methods.items():
            start = time.process_time()
            assert method(store) == samples_of(store)
            if number:  # the first round warms up
                seconds[name].append(time.process_time() - start)
        print(f"{store.url}: round {number}", file=sys.stderr, flush=True)

    def ratio(name: str, other: str) -> float:
        pairs = zip(seconds[name], seconds[other], strict=True)
        return statistics.median(reference / one for one, reference in pairs)

    return [
        {
            "way": name,
            "mb_s": stored / statistics.median(times) / 1e6,
            "samples_s": samples_of(store) / statistics.median(times),
            "microseconds": statistics.median(times) / samples_of(store) * 1e6,
            "of_raw": ratio(name, RAW),
            "of_webdataset": ratio(name, STOCK),
        }
        for name, times in seconds.items()
    ]


def read_files(store: Store) -> int:
    """Read every file with one ``readinto`` into new memory, as the loader's batches are."""
    for path in data_files(store):
        with open(path, "rb", buffering=0) as file:
            buffer = np.empty(os.fstat(file.fileno()).st_size, np.uint8)
            assert file.readinto(buffer.data) == len(buffer)
    return samples_of(store)


def read_rows(store: Store, options: Options) -> int:
    """Read only the bytes of each sample, in the loader's order: without reading tables, opening
    files or parsing. As many batches are held in memory as by the loader."""
    rows, order = _bare_rows(store.url)
    total = samples_of(store)
    batch = min(options.batch, total)
    alive: deque[list[np.ndarray]] = deque(maxlen=ALIVE)
    for begin in range(0, total - batch + 1, batch):
        shards, numbers = (x.tolist() for x in order.locate(np.arange(begin, begin + batch)))
        batches = []
        for stream in rows:
            size = max(stream[shards[0]][1])
            out = np.empty((batch, size), np.uint8)
            flat = out.reshape(-1).data
            for place, (shard, row) in enumerate(zip(shards, numbers, strict=True)):
                descriptor, sizes, begins = stream[shard]
                target = flat[place * size : place * size + sizes[row]]
                assert os.preadv(descriptor, [target], begins[row]) == sizes[row]
            batches.append(out)
        alive.append(batches)
    return total


@cache
def _bare_rows(
    url: str,
) -> tuple[list[dict[int, tuple[int, list[int], list[int]]]], SampleOrder]:
    """Per stream and shard: the file's descriptor, its samples' sizes and their offsets."""
    store = Store.open(url)
    order = SampleOrder(0, store.index().samples_per_shard)
    streams = []
    for stream in store.manifest.streams:
        files = {}
        for shard in range(store.manifest.num_shards):
            (file,) = shard_table(store.record(shard), stream).files
            ends = (file.offsets + file.sizes).max(1)
            begins = file.offsets.min(1)
            descriptor = os.open(f"{store.root}/{file.file}", os.O_RDONLY)
            files[shard] = descriptor, (ends - begins).tolist(), begins.tolist()
        streams.append(files)
    return streams, order


def load(store: Store, options: Options, *, verify: bool) -> int:
    """Read one shuffled epoch of both streams as a run does; CPU time of all threads counts."""
    total = samples_of(store)
    loader, batch = open_loader(store, options, verify=verify, epochs=1)
    read = sum(len(one.positions) for one in islice(loader, total // batch))
    loader.close()
    return read + total % batch  # complete batches only; store sizes are multiples of 32


def waiting_share(store: Store, options: Options, streams: tuple[str, ...] = ()) -> float:
    """Share of wall time that a consumer waits for batches after the first one, with checksums.
    Between batches it sleeps for the time of a batch at ``options.rate``, like a GPU's step."""
    loader, batch = open_loader(store, options, verify=True, streams=streams)
    batches = iter(loader)
    next(batches)
    waited, start = 0.0, time.perf_counter()
    while time.perf_counter() - start < options.seconds:
        time.sleep(batch / options.rate)
        before = time.perf_counter()
        next(batches)
        waited += time.perf_counter() - before
    total = time.perf_counter() - start
    loader.close()
    return waited / total


def open_loader(
    store: Store,
    options: Options,
    *,
    verify: bool,
    streams: tuple[str, ...] = (),
    epochs: int | None = None,
) -> tuple[BatchLoader, int]:
    """A loader, of all streams by default, and its batch size. Nothing is read ahead of so many
    ``epochs``."""
    fresh = Store.open(store.url)
    order = SampleOrder(0, fresh.index().samples_per_shard)
    batch = min(options.batch, samples_of(fresh))
    streams = streams or tuple(fresh.manifest.streams)
    until = None if epochs is None else epochs * (samples_of(fresh) // batch)
    loader = BatchLoader(
        fresh,
        streams,
        order,
        global_batch=batch,
        needed_until=None if until is None else dict.fromkeys(streams, until),
        verify=verify,
        threads=options.workers,
    )
    return loader, batch


@contextmanager
def one_core() -> Iterator[None]:
    """Bind this process to one of its cores."""
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(allowed)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)
