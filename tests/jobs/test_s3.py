"""Extraction, training, resume and inspection on an object store, with an outage."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from pipeline.extract.__main__ import main
from pipeline.store import Store
from schemas.extract import PRESETS
from tests.forks import COMMAND
from tests.helpers import all_files
from tests.s3 import SECRET, SeaweedFS

ROOT = Path(__file__).parents[2]
SHARDS = 16


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of 24 pictures each: encoding them takes longer than noticing the first shard."""
    folder = tmp_path_factory.mktemp("source")
    for number in range(3 * SHARDS):
        path = folder / f"class{number % 2}" / f"{number:02d}.png"
        path.parent.mkdir(exist_ok=True)
        Image.linear_gradient("L").rotate(7 * number).resize((40, 40)).convert("RGB").save(path)
    return folder


def command(*argv: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *COMMAND, *argv],
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> str:
    try:
        output, _ = process.communicate(timeout=240)
    finally:
        process.kill()
    assert SECRET not in output
    return output


def options_of(source: Path, store: str) -> list[str]:
    """Options of an extraction of ``source``."""
    demo = PRESETS["demo"]
    options = {
        "dataset": "folder",
        "source": source,
        "store": store,
        "shard-size": 3,
        "batch-size": 2,
        "cut": "activations",
        "resolution": demo["resolution"],
        "autoencoder": "demo",
        "layers": "2-5",
        "teacher.model": demo["teacher"]["model"],
        "teacher.weights": "demo",
        "teacher.image-size": demo["teacher"]["image_size"],
        **{
            f"teacher.model-args.{k.replace('_', '-')}": v
            for k, v in demo["teacher"]["model_args"].items()
        },
    }
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


def extract(source: Path, store: str, **environment: str) -> subprocess.Popen[str]:
    return command("-m", "pipeline.extract", *options_of(source, store), **environment)


def train(store: str, output: str, steps: int) -> subprocess.Popen[str]:
    options = {
        "config": "jobs/configs/demo.yaml",
        "store": store,
        "output": output,
        "steps": steps,
        "global-batch": 4,
        "log-every": 2,
        "workers.count": 2,
        "workers.cpus-per-worker": 0.5,
        "checkpoint.every": 4,
        "alignment.termination.step": 4,
        "alignment.projector-width": 16,
        "student.num-classes": 2,
    }
    arguments = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    return command("jobs/train_haste.py", *arguments)


@pytest.mark.timeout(600)
@pytest.mark.usefixtures("two_cpus")
def test_extract_through_an_outage_then_train_resume_and_inspect(
    s3: SeaweedFS, source: Path, tmp_path: Path
) -> None:
    bucket = s3.bucket()
    store_url, runs = f"{bucket}/store", f"{bucket}/runs"
    process = extract(source, store_url)
    store = _wait_for_a_shard(store_url, process)
    s3.kill()
    time.sleep(4)
    s3.restart()
    output = finish(process)
    assert process.returncode == 0, output
    assert f"complete: {3 * SHARDS} samples in {SHARDS} shards" in output
    assert "trying again for up to" in output
    assert store.missing_shards() == []

    assert main(options_of(source, str(tmp_path / "local"))) == 0  # undisturbed
    local = all_files(tmp_path / "local")
    remote = {
        path.removeprefix(f"{store.root}/"): store.filesystem.cat_file(path)
        for path in store.filesystem.find(store.root)
    }
    assert remote == local  # includes the absence of temporary files

    for steps in (4, 8):  # the second continues the run in the bucket
        process = train(store_url, runs, steps)
        output = finish(process)
        assert process.returncode == 0, output
        summary, _ = json.JSONDecoder().raw_decode(output, output.rindex("\n{\n") + 1)
    assert (summary["steps"], summary["termination_step"]) == (8, 4)
    assert summary["bytes_read"]["activations"]["before"] > 0
    assert summary["bytes_read"]["activations"]["after"] == 0
    metrics = store.filesystem.cat_file(f"{runs.removeprefix('s3://')}/demo/metrics.jsonl")
    rows = [json.loads(line) for line in metrics.splitlines()]
    assert [row["step"] for row in rows if "event" not in row] == [2, 4, 6, 8]
    for path in store.filesystem.find(runs):
        assert SECRET.encode() not in store.filesystem.cat_file(path), path

    process = command("-m", "pipeline.inspect", store_url, "--json")
    output = finish(process)
    found, _ = json.JSONDecoder().raw_decode(output, output.index("{"))
    assert (found["samples"], found["complete"]) == (3 * SHARDS, True)


def test_a_server_that_stays_down_is_one_clear_line(
    s3: SeaweedFS, source: Path, restarted: None
) -> None:
    store_url = f"{s3.bucket()}/store"
    process = extract(source, store_url, HASTE_STORAGE_RETRY_SECONDS="3")
    store = _wait_for_a_shard(store_url, process)
    s3.kill()
    output = finish(process)
    assert process.returncode == 2, output
    last = output.strip().splitlines()[-1]
    assert last.startswith("error: "), output
    assert "gave up after" in last
    s3.restart()
    committed = store.committed_shards()
    assert committed
    for shard in committed:
        for (file,) in store.record(shard).streams.values():
            assert store.filesystem.size(f"{store.root}/{file.file}") == file.bytes
    process = extract(source, store_url)
    output = finish(process)
    assert process.returncode == 0, output


@pytest.fixture
def restarted(s3: SeaweedFS) -> Iterator[None]:
    yield
    s3.restart()


def _wait_for_a_shard(url: str, process: subprocess.Popen[str]) -> Store:
    """The store, once its first shard is committed."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if Store.exists(url):
            store = Store.open(url)
            if store.committed_shards():
                return store
        time.sleep(0.1)
    raise AssertionError(f"no shard was committed: {finish(process)}")
