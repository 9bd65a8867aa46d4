"""Costs of a data set's size for a worker: opening, ordering, first batch, memory over time.

The store is simulated: manifest and index name any number of shards, and a patched filesystem
returns the one shard that was really written for each of them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import numpy as np
from fsspec.implementations.local import LocalFileSystem

from pipeline.storage.files import read_at_most
from pipeline.store import BatchLoader, SampleOrder, Store
from pipeline.store.layout import INDEX, MANIFEST
from schemas.store import STORE_VERSION, StoreIndex
from tests.bench.options import GrowthOptions as Options
from tests.bench.report import Heading, Report, Row, Table
from tests.bench.timing import peak_memory
from tests.helpers import write_known_store
from tests.stores import random_manifest

MEBI = 1 << 20
SHARD = 64
LATE = 3
"""Epoch at which a run is started as well."""

SIZES = (
    Heading("samples", "samples", ","),
    Heading("open_s", "open store s", ".2f"),
    Heading("order_s", "order object s", ".2f"),
    Heading("epoch_s", "epoch's order s", ".3f"),
    Heading("batch_us", "locate a batch us", ".0f"),
    Heading("first_s", "first batch s", ".2f"),
    Heading("late_s", "first batch, late s", ".2f"),
    Heading("memory_mib", "MiB kept", ".0f"),
    Heading("peak_mib", "MiB at most", ".0f"),
)
STEADY = (
    Heading("steps", "steps", ","),
    Heading("memory_mib", "MiB of the process", ".1f"),
    Heading("held_mib", "MiB of whole files", ".1f"),
)


def run(options: Options) -> Report:
    table = Table("Growth", SIZES)
    for samples in options.samples:  # each in a new process, whose memory is measured
        command = [sys.executable, "-m", __spec__.name, str(samples), str(options.batch)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        table.rows.append(json.loads(done.stdout))
    leaks = Table("Memory over a run", STEADY, list(measure_memory(options)))
    about = {"samples per shard": SHARD, "batch": options.batch, "begun late at": f"epoch {LATE}"}
    return Report(about, [table, leaks])


def measure(samples: int, batch: int) -> Row:
    """Row of the first table."""
    with (
        tempfile.TemporaryDirectory(prefix="haste-bench-") as folder,
        simulated_store(folder, samples),
    ):
        before = resident()
        start = time.perf_counter()
        store = Store.open(folder)
        counts = store.index().samples_per_shard
        opened = time.perf_counter()
        order = SampleOrder(0, counts)
        del counts
        ordered = time.perf_counter()
        order.epoch_span(0)
        order.locate(np.arange(1))
        located = time.perf_counter()
        for step in range(1, 101):
            order.locate(np.arange(step * batch, (step + 1) * batch))
        batches = time.perf_counter()
        first = first_batch(store, order, batch, 0)
        late = first_batch(store, order, batch, LATE * samples // batch)
        return {
            "samples": samples,
            "open_s": opened - start,
            "order_s": ordered - opened,
            "epoch_s": located - ordered,
            "batch_us": (batches - located) / 100 * 1e6,
            "first_s": first,
            "late_s": late,
            "memory_mib": (resident() - before) / MEBI,
            "peak_mib": (peak_memory() - before) / MEBI,
        }


def first_batch(store: Store, order: SampleOrder, batch: int, step: int) -> float:
    """Seconds until a loader that starts at ``step`` has its first batch."""
    start = time.perf_counter()
    loader = BatchLoader(store, ("latents", "maps"), order, global_batch=batch, start_step=step)
    next(iter(loader))
    seconds = time.perf_counter() - start
    loader.close()
    return seconds


def measure_memory(options: Options) -> Iterator[Row]:
    """Memory after each fifth of a long run."""
    with tempfile.TemporaryDirectory(prefix="haste-bench-") as folder:
        store = write_known_store(folder, (SHARD,) * 40)
        order = SampleOrder(0, store.index().samples_per_shard)
        batch = min(options.batch, 32)  # limits the run time
        loader = BatchLoader(store, ("latents", "maps"), order, global_batch=batch)
        for number, _ in enumerate(loader, start=1):
            if number % (options.steps // 5) == 0:
                yield {
                    "steps": number,
                    "memory_mib": resident() / MEBI,
                    "held_mib": loader.budget.used / MEBI,
                }
                if number >= options.steps // 5 * 5:
                    break
        loader.close()


@contextmanager
def simulated_store(folder: str, samples: int) -> Iterator[None]:
    """Simulate a store of ``samples`` samples in ``folder``; only one of its shards exists."""
    shards = -(-samples // SHARD)
    written = write_known_store(folder, (SHARD,))
    manifest = random_manifest(samples, SHARD)
    sizes = [SHARD] * (shards - 1) + [samples - (shards - 1) * SHARD]
    index = StoreIndex(
        version=STORE_VERSION,
        samples_per_shard=sizes,
        bytes_per_stream=dict.fromkeys(manifest.streams, 0),
    )
    Path(folder, MANIFEST).write_text(manifest.model_dump_json())
    Path(folder, INDEX).write_text(index.model_dump_json())
    del index, sizes, written
    info, open_file = LocalFileSystem.info, os.open

    def existing(path: str) -> str:
        head, _, tail = str(path).rpartition("/shard-")
        return f"{head}/shard-000000{Path(tail).suffix}" if head else str(path)

    def read(filesystem: LocalFileSystem, path: str, size: int) -> bytes:
        data = read_at_most(filesystem, path, size)
        if "/commits/" in path:
            number = int(path.rpartition("-")[2].partition(".")[0])
            data = data.replace(b'"shard":0,', b'"shard":%d,' % number, 1)
        return data

    with (
        patch("pipeline.store.store.read_at_most", read),
        patch.object(LocalFileSystem, "info", lambda self, path: info(self, existing(path))),
        patch("os.open", lambda path, *args, **kw: open_file(existing(path), *args, **kw)),
    ):
        yield


def resident() -> int:
    """Resident bytes of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    print(json.dumps(measure(int(sys.argv[1]), int(sys.argv[2]))))
