"""Stores and runs that were written at commit e20d803: read, gone on with, named the same.

Names on disk are frozen, of files and of keys inside them. A name that is added or changed on
purpose needs a fixture of its own, beside tests/fixtures/store_and_run_0.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from pipeline.checkpoints.student import load_student
from pipeline.convert import convert
from pipeline.runs.reader import read_run
from pipeline.store import Store, StreamReader
from pipeline.store.codecs import column_arrays, decode_column
from pipeline.targets.sources import Wanted, read_targets
from pipeline.train.local import train_here
from schemas.convert import ConvertConfig
from schemas.run import RunConfig
from schemas.streams import Column
from tests.fixtures.store_and_run_0.measures import arithmetic, few, one_thread, sha256_of

FIXTURE = Path(__file__).parents[1] / "fixtures" / "store_and_run_0"
EXPECTED = json.loads((FIXTURE / "expected.json").read_text())
CODECS = load_file(FIXTURE / "codecs.safetensors")
STORES = ("store_tar", "store_zarr")

ALIGNED, ALONE, LAST = (f"checkpoint-{step:09d}" for step in (5, 10, 13))
LOST = Path("maps", "shard-000001.tar")
"""The file that the run found missing in its first epoch."""
TEACHERS = {"bytes_read_maps", "bytes_per_second_maps"}
"""Keys of a row while a teacher stream is open."""
LOSSES = ("denoising", "feature", "attention", "teacher_entropy", "grad_norm")
TOLERANCE = 1e-5
"""Relative, between CPUs of several types; within one, not a bit may differ."""

RUNS = {
    "from phase 1": (ALIGNED, "store_tar"),
    "from phase 1 on zarr": (ALIGNED, "store_zarr"),
    "from phase 2": (ALONE, "store_tar"),
    "uninterrupted": (None, "store_tar"),
}
"""Checkpoint that each one goes on from, and store."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of the runs of ``RUNS``, each taken to its last step by the present code."""
    return {name: finish(tmp_path_factory.mktemp("run"), *of) for name, of in RUNS.items()}


def finish(folder: Path, checkpoint: str | None, store: str) -> Path:
    """Train to the last step on a copy of a store, from a copy of the run as it was when it had
    written ``checkpoint``, or from the beginning where it had none and a file was missing."""
    run = folder / "run"
    shutil.copytree(FIXTURE / store, folder / "store")
    if checkpoint is None:
        (folder / "store" / LOST).unlink()
    else:
        shutil.copytree(FIXTURE / "run", run)
        if checkpoint == ALIGNED:
            shutil.rmtree(run / ALONE)
    config = yaml.safe_load((FIXTURE / "run" / "config.yaml").read_text())
    config |= {"store": str(folder / "store"), "output": str(folder)}
    with one_thread():
        train_here(RunConfig.model_validate(config), run)
    return run


@pytest.mark.parametrize("name", STORES)
def test_what_is_stored_of_every_sample(name: str) -> None:
    store = Store.open(str(FIXTURE / name))
    assert store.manifest.skipped == store.record(2).skipped
    assert [image.key for image in store.manifest.skipped] == ["digit-1168"]
    assert stored(store) == {
        stream: EXPECTED["arrays"][stream] for stream in store.manifest.streams
    }


@pytest.mark.parametrize("name", STORES)
def test_decoded_columns_and_targets(name: str) -> None:
    store = Store.open(str(FIXTURE / name))
    for stream, about in store.manifest.streams.items():
        arrays = {part: torch.from_numpy(array) for part, array in read(store, stream).items()}
        columns = {n: few(decode_column(n, c, arrays)) for n, c in about.columns.items()}
        assert_close(columns, EXPECTED["decoded"][stream])
    for stream in store.manifest.teacher_streams:
        with one_thread():
            targets = read_targets(store, *places(store), Wanted(True, (2, 1), 2), stream)
        numbers = {part: few(tensor) for part, tensor in targets._asdict().items()}
        assert_close(numbers, EXPECTED["targets"][stream])


@pytest.mark.parametrize("name", sorted({key.split("/")[0] for key in CODECS}))
def test_every_codec_reads_what_it_stored(name: str) -> None:
    arrays = {
        key.split("/")[1]: array for key, array in CODECS.items() if key.startswith(f"{name}/")
    }
    decoded = arrays.pop("decoded")
    column = Column(shape=tuple(decoded.shape[1:]), codec=name)
    assert set(column_arrays("x", column)) == arrays.keys()
    got = decode_column("x", column, arrays).float()
    torch.testing.assert_close(got, decoded, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", STORES)
def test_a_store_that_is_written_now_has_the_same_names(name: str, tmp_path: Path) -> None:
    """Names, and arrays; how small a compressor makes them is its own affair."""
    options = {"source": str(FIXTURE / name), "target": str(tmp_path / "store"), "device": "cpu"}
    made = convert(ConvertConfig.model_validate(options)).store
    old, new = FIXTURE / name, tmp_path / "store"
    assert files(new) == files(old)
    assert json_of(new / "manifest.json") == json_of(old / "manifest.json")
    for path in files(old):
        if path.endswith(".json"):
            assert names(json_of(new / path)) == names(json_of(old / path)), path
        elif path.endswith(".tar"):
            assert members(new / path) == members(old / path)
    assert stored(made) == stored(Store.open(str(old)))


@pytest.mark.parametrize("name", RUNS)
def test_a_run_ends_as_it_did(runs: dict[str, Path], name: str) -> None:
    """Order of samples, moments, averages, trigger and the row that was half measured: all of them
    decide these numbers."""
    run = runs[name]
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for row, expected in zip(rows, EXPECTED["rows"], strict=True):
        resumed_alone = name == "from phase 2" and row["step"] > 10  # it opens no teacher stream
        assert row.keys() == expected.keys() - (TEACHERS if resumed_alone else set())
    assert_close([measured(row) for row in rows], [measured(row) for row in EXPECTED["rows"]])
    for kind in ("model", "ema"):
        expected = load_file(FIXTURE / "final" / f"{kind}.safetensors")
        assert_close_weights(load_file(run / LAST / f"{kind}.safetensors"), expected)
    for kind in ("projector", "projector_ema"):
        expected = load_file(FIXTURE / "run" / ALONE / f"{kind}.safetensors")
        assert_close_weights(load_file(run / LAST / f"{kind}.safetensors"), expected)
    assert_same_state(json_of(run / LAST / "state.json"), EXPECTED["state"])


def test_every_checkpoint_has_the_same_names(runs: dict[str, Path]) -> None:
    run = runs["uninterrupted"]
    for checkpoint in (ALIGNED, ALONE):
        assert files(run / checkpoint) == files(FIXTURE / "run" / checkpoint)
        state = json_of(FIXTURE / "run" / checkpoint / "state.json")
        assert_same_state(json_of(run / checkpoint / "state.json"), state)
    assert {path.name for path in run.iterdir()} == {
        *(path.name for path in (FIXTURE / "run").iterdir()),
        LAST,
        "summary.json",
        "tensorboard",
    }
    configs = [
        yaml.safe_load((path / "config.yaml").read_text()) for path in (run, FIXTURE / "run")
    ]
    assert elsewhere(configs[0]) == elsewhere(configs[1])


@pytest.mark.parametrize("name", RUNS)
def test_the_summary(runs: dict[str, Path], name: str) -> None:
    summary = without_added(json_of(runs[name] / "summary.json"))
    assert names(summary) == names(EXPECTED["summary"])
    for key in ("name", "steps", "termination_step"):
        assert summary[key] == EXPECTED["summary"][key]
    assert summary["bytes_read"]["maps"]["after"] == 0


@pytest.mark.parametrize(
    ("name", "checkpoint"), [("from phase 1", ALIGNED), ("from phase 2", ALONE)]
)
def test_what_was_read_before_counts_on(runs: dict[str, Path], name: str, checkpoint: str) -> None:
    now = json_of(runs[name] / "summary.json")["bytes_read"]
    was = json_of(FIXTURE / "run" / checkpoint / "state.json")["bytes_read"]
    if checkpoint == ALIGNED:
        assert now["maps"]["before"] > was["maps"]["before"] > 0
    else:
        assert now["maps"] == was["maps"]
        assert now["latents"]["before"] == was["latents"]["before"] > 0
    assert now["latents"]["after"] > was["latents"]["after"]


def test_formats_of_the_store_make_no_difference(runs: dict[str, Path]) -> None:
    """Bits can be compared on any CPU here: both runs are of this process."""
    tars, zarr = (weights(runs[name] / LAST) for name in ("from phase 1", "from phase 1 on zarr"))
    assert_same_weights(zarr, tars)


def test_a_projector_that_was_let_go_is_kept_as_it_is(runs: dict[str, Path]) -> None:
    kept, was = weights(runs["from phase 2"] / LAST), weights(FIXTURE / "run" / ALONE)
    chosen = [name for name in was if name.startswith("projector")]
    assert len(chosen) > 8
    assert_same_weights({name: kept[name] for name in chosen}, {name: was[name] for name in chosen})


def test_not_a_bit_differs_where_arithmetic_is_the_same(runs: dict[str, Path]) -> None:
    if arithmetic() != EXPECTED["arithmetic"]:
        pytest.skip("this CPU, or another version of torch, rounds differently from the fixture's")
    for checkpoint in (ALIGNED, ALONE):
        made = weights(runs["uninterrupted"] / checkpoint)
        assert_same_weights(made, weights(FIXTURE / "run" / checkpoint))
    last = weights(runs["uninterrupted"] / LAST)
    for name, run in runs.items():
        assert_same_weights(weights(run / LAST), last)
        for file, sha256 in EXPECTED["final_sha256"].items():
            assert hashlib.sha256((run / LAST / file).read_bytes()).hexdigest() == sha256, name


def test_a_checkpoint_is_sampled_from() -> None:
    student, state = load_student(FIXTURE / "run")
    assert_same_weights(
        student.state_dict(), load_file(FIXTURE / "run" / ALONE / "ema.safetensors")
    )
    assert state.step == 10
    assert state.autoencoder == Store.open(str(FIXTURE / "store_tar")).manifest.autoencoder


def test_a_run_is_reported_on() -> None:
    record = read_run(str(FIXTURE / "run"))
    assert record.warnings == []
    assert [row["step"] for row in record.rows] == [2, 4, 6, 7, 8, 10]
    assert record.valid is not None
    assert (record.termination, record.checkpoints, record.bytes_step) == (7, [5, 10], 10)
    state = json_of(FIXTURE / "run" / ALONE / "state.json")
    assert record.bytes_read == state["bytes_read"]


def places(store: Store) -> tuple[np.ndarray, np.ndarray]:
    """Shard and row of every sample, in order."""
    sizes = store.index().samples_per_shard
    return np.repeat(np.arange(len(sizes)), sizes), np.concatenate([np.arange(n) for n in sizes])


def read(store: Store, stream: str) -> dict[str, np.ndarray]:
    """Stored arrays of every sample of a stream, by column."""
    return StreamReader(store, stream).read(*places(store))


def stored(store: Store) -> dict[str, dict[str, str]]:
    """Per stream and key the SHA-256 of what is stored of the sample."""
    keys = [key for shard in range(store.manifest.num_shards) for key in store.record(shard).keys]
    hashes = {}
    for stream in store.manifest.streams:
        arrays = read(store, stream)
        hashes[stream] = {
            key: sha256_of({part: array[i] for part, array in arrays.items()})
            for i, key in enumerate(keys)
        }
    return hashes


def files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def members(path: Path) -> list[str]:
    with tarfile.open(path) as tar:
        return tar.getnames()


def json_of(path: Path) -> Any:
    return json.loads(path.read_text())


def names(values: Any, where: str = "") -> set[str]:
    """Dotted keys of everything in a JSON document; items of lists count as one."""
    if isinstance(values, dict):
        inner = [(f"{where}.{key}", value) for key, value in values.items()]
    elif isinstance(values, list):
        inner = [(f"{where}[]", value) for value in values]
    else:
        return {where}
    return {where}.union(*(names(value, name) for name, value in inner))


def measured(row: dict[str, Any]) -> dict[str, Any]:
    """Values of a row that depend neither on the clock nor on reading ahead."""
    kept = ("step", "phase", "event", "trigger", "residual_fast", "residual_slow", *LOSSES)
    return {name: value for name, value in row.items() if name in kept}


def elsewhere(config: dict[str, Any]) -> dict[str, Any]:
    """A config without where things lie."""
    return {**config, "store": None, "output": None}


def without_added(values: dict[str, Any]) -> dict[str, Any]:
    """A state or summary without the bytes of streams that only one of the stores has."""
    added = {stream: values["bytes_read"].get(stream) for stream in ("early", "mixed")}
    assert all(count in (None, {"before": 0, "after": 0}) for count in added.values())
    kept = {name: n for name, n in values["bytes_read"].items() if name not in added}
    return {**values, "bytes_read": kept}


def assert_same_state(state: dict[str, Any], expected: dict[str, Any]) -> None:
    """Compare keys, and values but for checksums, places and bytes."""
    state = without_added(state)
    assert names(state) == names(expected)
    told = {"files": None, "sha256": None, "bytes_read": None}
    one, other = ({**s, **told, "config": elsewhere(s["config"])} for s in (state, expected))
    assert_close(one, other)


def assert_close(got: Any, expected: Any, where: str = "") -> None:
    """Compare plain values: floats to ``TOLERANCE``, all else exactly."""
    assert type(got) is type(expected), where
    if isinstance(expected, dict):
        assert got.keys() == expected.keys(), where
        for key, value in expected.items():
            assert_close(got[key], value, f"{where}.{key}")
    elif isinstance(expected, list):
        assert len(got) == len(expected), where
        for number, value in enumerate(expected):
            assert_close(got[number], value, f"{where}[{number}]")
    elif isinstance(expected, float):
        assert got == pytest.approx(expected, rel=TOLERANCE, abs=1e-6), where
    else:
        assert got == expected, where


def assert_close_weights(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        apart = (got[name] - tensor).norm().item()
        assert apart <= TOLERANCE * tensor.norm().item() + 1e-6, name


def assert_same_weights(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(got[name], tensor), name


def weights(checkpoint: Path) -> dict[str, Tensor]:
    """All of a checkpoint's, by file and name."""
    return {
        f"{path.stem}.{name}": tensor
        for path in sorted(checkpoint.glob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }
