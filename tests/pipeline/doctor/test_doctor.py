"""The examination of a cluster: each failure is made, or reported by a fake node."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import ray

from pipeline.doctor import examination
from pipeline.doctor.__main__ import main
from pipeline.doctor.findings import (
    Failure,
    Finding,
    describe,
    judge_clocks,
    judge_free,
    judge_gpus,
    judge_read,
    judge_same,
    judge_versions,
)
from pipeline.doctor.probe import Probe, source_digest
from pipeline.storage.retry import RETRY_VARIABLE
from pipeline.store import Store
from schemas.errors import UserError
from tests.faults.environments import DISK_MEGABYTES, mount, unmount
from tests.s3 import SeaweedFS

ROOT = Path(__file__).parents[3]
OWN = {"python": "3.12.1", "torch": "2.15.0", "ray": "2.60.0", "pipeline": "abc"}


@pytest.fixture(autouse=True)
def limit_of_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    """A probe sets it for its process, which is that of the tests here."""
    monkeypatch.setenv(RETRY_VARIABLE, "20")


def status(findings: list[Finding], check: str = "") -> list[str]:
    return [one.status for one in findings if not check or one.check == check]


def test_versions_that_differ_are_named() -> None:
    answers: dict[str, Any] = {
        "a": OWN,
        "b": {**OWN, "torch": "2.11.0", "pipeline": "def"},
        "c": {k: v for k, v in OWN.items() if k != "ray"},
        "d": Failure("the actor died"),
    }
    found = judge_versions(answers, OWN)
    assert status(found) == ["ok", "fail", "fail", "fail"]
    assert found[1].found == "torch 2.11.0 (driver: 2.15.0); pipeline def (driver: abc)"
    assert found[2].found == "ray missing (driver: 2.60.0)"


@pytest.mark.parametrize(
    ("offset", "uncertain", "expected"),
    [(0.1, 0.0, "ok"), (-60.0, 0.1, "fail"), (60.0, 0.1, "fail"), (6.0, 2.0, "ok")],
)
def test_clocks(offset: float, uncertain: float, expected: str) -> None:
    assert status(judge_clocks({"a": (offset, uncertain)})) == [expected]


def test_read_rate_disk_and_gpus_against_the_need() -> None:
    rates: dict[str, Any] = {"a": 2e6, "b": 0.5e6}
    assert status(judge_read(rates, 1e6)) == ["ok", "fail"]
    assert status(judge_read(rates, None)) == ["ok", "ok"]
    assert status(judge_free("disk", {"a": 100, "b": 99}, 100, "x")) == ["ok", "fail"]
    names: dict[str, Any] = {"a": ["H200"] * 8, "b": ["H200"] * 7, "c": [], "d": []}
    assert status(judge_gpus(names, {"a": 8, "b": 8, "c": 1})) == ["ok", "fail", "fail", "ok"]
    same: dict[str, Any] = {"a": "1", "b": "1", "c": "2", "d": Failure("no such file")}
    assert status(judge_same("teacher", same, "weights")) == ["ok", "ok", "fail", "fail"]


def test_the_table_says_how_many_failed() -> None:
    page = describe([Finding("ok", "a", "n", "x\ny"), Finding("fail", "bb", "nn", "z")])
    assert page.splitlines() == ["ok    a   n   x y", "fail  bb  nn  z", "1 of 2 checks failed"]


def test_a_write_leaves_nothing(tmp_path: Path) -> None:
    Probe().write(str(tmp_path), "--output")
    assert list(tmp_path.iterdir()) == []


def test_a_write_to_s3(s3: SeaweedFS) -> None:
    bucket = s3.bucket()
    Probe().write(f"{bucket}/runs", "--output")
    assert Probe().claim(bucket, "--output", "one")
    assert not Probe().claim(bucket, "--output", "one")
    assert Probe().sees(bucket, "--output", "one")
    Probe().remove(bucket, "--output", "one")
    assert not Probe().sees(bucket, "--output", "one")


def test_storage_without_conditions_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.doctor.probe.write_new", lambda *_: True)
    monkeypatch.setattr("pipeline.doctor.probe.remove", lambda *_: None)
    with pytest.raises(UserError, match="no conditional writes"):
        Probe().write(str(tmp_path), "--output")


def test_read_counts_bytes(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(1 << 20))
    rate = Probe().read(str(tmp_path), [str(tmp_path / "file")], threads=2, seconds=0.05)
    assert 1e6 < rate < 1e12


def test_free_bytes_of_a_folder_to_come(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    try:
        mount(disk)
    except OSError as error:
        pytest.skip(f"no tmpfs: {error}")
    try:
        free = Probe().free_bytes(str(disk / "not" / "made"))
        assert 0 < free <= DISK_MEGABYTES << 20
        (disk / "ballast").write_bytes(bytes(50 << 20))
        assert Probe().free_bytes(str(disk)) <= free - (50 << 20)
    finally:
        unmount(disk)


def test_the_digest_is_of_this_source() -> None:
    assert source_digest() == source_digest()
    assert Probe().versions()["ray"] == ray.__version__


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, dict[str, Any]]:
    """The report for a run of the demo, whose checkpoints fit the disk of any machine."""
    demo = ("--config", str(ROOT / "jobs/configs/demo.yaml"), "--read-seconds", "0.05")
    code = main([*words, *demo, "--json", "--all-reduce-mb", "1"])
    return code, json.loads(capsys.readouterr().out)


def failures(report: dict[str, Any]) -> list[dict[str, str]]:
    return [one for one in report["checks"] if one["status"] == "fail"]


@pytest.mark.usefixtures("two_cpus")
def test_a_healthy_cluster(
    digits_store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--store", digits_store.url, "--output", str(tmp_path / "runs"), "--workers", "2")
    code, report = run(capsys, *words, "--plan.tflops", "0.000001")
    assert (code, report["ok"]) == (0, True), failures(report)
    checks = {one["check"]: one["status"] for one in report["checks"]}
    assert checks.pop("all-reduce") == "note"
    assert set(checks.values()) == {"ok"}
    assert checks.keys() >= {
        *("versions", "clock", "workers", "store read", "store write", "output write"),
        *("output shared", "checkpoint disk", "shm", "gpu", "teacher", "autoencoder"),
    }
    read = next(one for one in report["checks"] if one["check"] == "store read")
    assert "that the run needs" in read["found"]


@pytest.mark.usefixtures("two_cpus")
def test_a_cluster_with_faults(
    digits_store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An output that cannot be written, a cache larger than the disk, more workers than room, and a
    faster device than the store feeds."""
    words = ("--store", digits_store.url, "--output", "/proc/runs", "--workers", "3")
    words += ("--data.cache-dir", str(tmp_path), "--data.cache-gb", "1e9")
    code, report = run(capsys, *words, "--plan.tflops", "1e9", "--models", "false")
    assert code == 1
    failed = {one["check"]: one["found"] for one in failures(report)}
    assert failed.keys() == {
        "output write",
        "cache disk",
        "checkpoint disk",
        "workers",
        "store read",
    }
    assert failed["workers"] == "room for 2 workers of 3"
    assert "cannot write" in failed["output write"]


@pytest.fixture
def two_probes(two_cpus: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one node of the cluster under two addresses."""
    (node,) = ray.nodes()
    other = {**node, "NodeManagerAddress": "127.0.0.1"}
    monkeypatch.setattr(examination.ray, "nodes", lambda: [node, other])


@pytest.mark.usefixtures("two_probes")
def test_nodes_reduce_and_share_the_output(
    digits_store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--store", digits_store.url, "--output", str(tmp_path), "--models", "false")
    code, report = run(capsys, *words)
    assert code == 0, failures(report)
    found = [one for one in report["checks"] if one["check"] == "all-reduce"]
    assert [one["status"] for one in found] == ["ok", "ok"]
    assert "gloo, 2 nodes" in found[0]["found"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("two_probes")
def test_folders_that_are_not_shared_are_found(
    digits_store: Store,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each node has a folder of its own under the name of the output."""

    class Alone(Probe):
        def claim(self, url: str, what: str, name: str) -> bool:
            return super().claim(f"{url}/{os.getpid()}", what, name)

    monkeypatch.setattr(examination, "Probe", Alone)
    words = ("--store", digits_store.url, "--output", str(tmp_path), "--models", "false")
    code, report = run(capsys, *words)
    assert code == 1
    (failed,) = failures(report)
    assert failed["check"] == "output shared"
    assert "2 of 2 nodes made the same new file" in failed["found"]


@pytest.mark.usefixtures("two_cpus")
def test_without_a_store_the_models_of_the_extraction_are_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--store", str(tmp_path / "store"), "--output", str(tmp_path / "runs"))
    extraction = ("--extract.dataset", "demo", "--extract.teacher.weights", "/no/weights.pth")
    code, report = run(capsys, *words, *extraction)
    assert code == 1
    (failed,) = failures(report)
    assert failed["check"] == "teacher"
    assert "/no/weights.pth" in failed["found"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--store is missing"),
        (["--store", "a", "--workers", "0"], "workers.count"),
        (["--store", "a", "--worker", "2"], "unknown option --worker"),
    ],
)
def test_refusals(words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        main(words)


def test_the_help_is_quick(tmp_path: Path) -> None:
    command = [sys.executable, "-X", "importtime", "-m", "pipeline.doctor", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "--read-seconds" in done.stdout
    loaded = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.split("\n")}
    assert loaded & {"torch", "ray", "diffusers"} == set()
