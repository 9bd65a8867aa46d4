"""Every bench runs at toy size and reports its numbers. Times are not asserted."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch

from pipeline.assets import DEMO_AUTOENCODER
from pipeline.cli.config_files import merge
from pipeline.store import Store
from pipeline.train.local import train_here
from pipeline.train.trainer import Trainer
from schemas.errors import UserError
from schemas.run import RunConfig
from tests.bench import commands, resume, timed_run
from tests.bench.__main__ import BENCHES, main
from tests.bench.options import CommandsOptions
from tests.bench.pixels import differences
from tests.bench.scaling import Usage, efficiency, usage
from tests.processes import PRELOADED
from tests.stores import tiny_run

TEACHER = {
    "patch-size": 4,
    "embed-dim": 128,
    "depth": 4,
    "num-heads": 2,
}
TINY = {
    "frontier": [
        *["--count", "2", "--resolution", "32", "--layers", "1-3", "--measured", "2,3"],
        *["--teacher.model", "vit_small_patch14_dinov2.lvd142m", "--teacher.image-size", "32"],
        *(
            part
            for name, value in TEACHER.items()
            for part in (f"--teacher.model-args.{name}", str(value))
        ),
    ],
    "calibration": ["--weights", "plain", "--codecs", "faithful", "--calibrated", "2"],
    "backends": ["--places", "disk", "--forms", "tiny", "--repeats", "1"],
    "step": [
        *["--student", "SiT-S/2", "--depth", "2", "--width", "96", "--batch", "2"],
        *["--rounds", "1", "--memory", "false", "--recipe", "irepa_paper,sit_b2_irepa"],
    ],
    "loader": ["--forms", "tiny", "--rounds", "1", "--seconds", "0.1"],
    "sampling": ["--batch", "2", "--steps", "3", "--rounds", "1"],
    "evaluation": ["--count", "64", "--manifold", "64", "--width", "4"],
    "extract": ["--networks", "demo", "--rounds", "1"],
    "optimizer": ["--student", "SiT-S/2", "--depth", "1", "--rounds", "1"],
    "attention": [
        *["--batch", "1", "--layers", "1", "--heads", "2", "--tokens", "16"],
        *["--rounds", "1", "--compiled", "false"],
    ],
    "arithmetic": [
        *["--student", "SiT-S/2", "--depth", "2", "--width", "64", "--heads", "4"],
        *["--batch", "2", "--tapped", "1"],
    ],
    "table": ["--only", "tiny"],
    "growth": ["--samples", "1000", "--batch", "32", "--steps", "10"],
    "shuffle": ["--samples", "2000", "--classes", "10", "--windows", "1,8", "--batches", "5"],
    "checkpoint": ["--student", "SiT-S/2", "--depth", "1", "--every", "3"],
    "resume": ["--student", "SiT-S/2", "--depth", "1", "--rounds", "1"],
    "commands": ["--only", "pipeline.report", "--rounds", "1", "--starts", "0"],
    "scaling": ["--workers", "[]", "--encoders", "20", "--shards", "50"],
}
TINY["calibration"] += TINY["frontier"]


SLOW = ("arithmetic", "scaling")


@pytest.fixture
def few_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """``resume`` runs the program of ``checkpoint`` in this process, and those of ``evaluation``,
    whose own memory is of no interest here, are forked after the import of torch."""

    def run_here(_: Path, config: dict[str, Any], folder: Path, options: Any, stop: int = 0) -> Any:
        with patch.object(Trainer, "train_step", Trainer.train_step):  # put back
            return timed_run.main(config, str(folder), options.threads, stop)

    monkeypatch.setattr(resume, "timed_run", run_here)
    multiprocessing.set_forkserver_preload(PRELOADED)
    forkserver = multiprocessing.get_context("forkserver")
    monkeypatch.setattr(multiprocessing, "get_context", lambda *_: forkserver)


def test_first_results_take_turns_and_count_all_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The work is done by a child in a session of its own, as Ray's processes are."""
    work = "import time\nwhile time.process_time() < 0.5: pass\nopen('done', 'w')\ntime.sleep(3)"
    child = "import subprocess, sys; subprocess.run(sys.argv[1:], start_new_session=True)"
    place = tmp_path / "place"
    place.mkdir()
    command = ["-c", child, sys.executable, "-c", work]
    seconds, cpu = commands._until(place, command, lambda: place.glob("done"))
    assert 0.5 <= cpu <= seconds * 2
    turns: list[str] = []

    def until(tree: Path, *_: Any) -> tuple[float, float]:
        turns.append(tree.name)
        for name in ("0", "1", "0_before", "1_before"):
            (tmp_path / name).mkdir(exist_ok=True)
        return (1.0, 2.0) if tree.name == "new" else (4.0, 4.0)

    monkeypatch.setattr(commands, "_until", until)
    monkeypatch.setattr(commands, "_start", lambda *_: SimpleNamespace(wait=lambda: 0))
    trees = {"": Path("new"), "_before": Path("old")}
    rows = commands._starts(trees, tmp_path, CommandsOptions(starts=2))
    assert turns == ["new", "new", "old", "old"] * 2
    assert [(row["ratio"], row["cpu_ratio"]) for row in rows] == [(0.25, 0.5)] * 2


@pytest.mark.usefixtures("few_processes")
def test_a_checkpoint_of_two_workers(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--student", "SiT-S/2", "--depth", "1", "--workers", "2"]
    assert main(["checkpoint", "--json", *options]) == 0
    (rows,) = json.loads(capsys.readouterr().out)["tables"].values()
    assert [row["name"] for row in rows] == [1, 2]
    assert rows[1]["gigabytes"] == pytest.approx(rows[0]["gigabytes"] / 2, rel=0.05)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] if n in SLOW else []) for n in TINY]
)
@pytest.mark.usefixtures("few_processes")
def test_a_tiny_bench_prints_one_json_object(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "--json", *TINY[name]]) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    report = json.loads(out)
    assert report["bench"] == name
    assert report["machine"]["torch"]
    assert all(rows for rows in report["tables"].values())


def test_scaling_counts_idle_daemons_for_the_time_of_free_cores() -> None:
    """20 CPU seconds of work on one core took 100 s on a busy machine. The daemons used 8 of them:
    0.05 of a core all the time, which are 1 s on a free core, and 3 s for the work."""
    plain, ray = Usage(wall=80, cpu=21.6, daemons=0), Usage(wall=100, cpu=28, daemons=8)
    assert efficiency(plain, ray, 0.05, 1) == pytest.approx(21.6 / (20 + 3 + 1))
    quiet = ray._replace(cpu=24, daemons=4)  # less than idle ones: none of it is for the work
    assert efficiency(plain, quiet, 0.05, 1) == pytest.approx(21.6 / (20 + 1))


def test_pixels(
    random_store: Store,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tests.bench.pixels.compile_student", lambda student: None)  # minutes
    values: dict[str, Any] = {"steps": 1, "store": random_store.url, "checkpoint": {"every": 1}}
    train_here(RunConfig.model_validate(merge(tiny_run(), values)), tmp_path)
    options = ["--checkpoint", str(tmp_path), "--autoencoder", str(DEMO_AUTOENCODER)]
    assert set(TINY) | {"pixels"} == set(BENCHES)
    assert main(["pixels", "--json", "--images", "3", "--steps", "2", *options]) == 0
    (rows,) = json.loads(capsys.readouterr().out)["tables"].values()
    assert len(rows) == 8
    by_arm = {row["arithmetic"]: row["mean"] for row in rows if row["sampler"] == "ode"}
    assert by_arm["bfloat16"] == by_arm["bfloat16, compiled"]
    assert by_arm["float32, compiled"] == 0  # the same arithmetic as the reference


def test_differences_of_pixels() -> None:
    reference = torch.zeros(1, 1, 2, 2)
    images = torch.tensor([[[[0.0, 3.0], [0.0, 9.0]]]])
    assert dict(differences(images, reference)) == pytest.approx(
        {"mean": 3.0, "rms": 22.5**0.5, "psnr": 20 * math.log10(255 / 22.5**0.5)}
        | {"above": 0.25, "most": 9.0}
    )
    assert dict(differences(reference, reference))["psnr"] is None


def test_reading_captions_is_measured_beside_without(capsys: pytest.CaptureFixture[str]) -> None:
    streams = ["--streams", "latents,text,activations"]
    assert main(["loader", "--json", *TINY["loader"], *streams]) == 0
    report = json.loads(capsys.readouterr().out)
    (rows,) = report["tables"].values()
    assert [row["way"] for row in rows] == ["latents,activations", "latents,text,activations"]
    size = report["text_bytes"]
    assert 0.7 * 77 * 768 / 2 < size < 77 * 768 * 4 / 4  # one caption a visit, a tenth dropped


def test_exact_variants_have_no_error_and_finer_ones_less(
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = ["--singles", "false", "--weights", "planted", "--json", *TINY["frontier"]]
    assert main(["frontier", *options]) == 0
    tables = json.loads(capsys.readouterr().out)["tables"]
    rows = {(row["cut"], row["form"]): row for table in tables.values() for row in table}
    assert len(rows) == 19
    for cut, form in (("image", "faithful"), ("maps", "float32"), ("activations", "float32")):
        assert rows[cut, form]["kl"] < 1e-12
        assert rows[cut, form]["gradient_cosine"] > 0.999999
    for cut in ("maps", "qk", "activations"):
        assert rows[cut, "faithful"]["kl"] < rows[cut, "small"]["kl"] < 1e-2


def test_tables_are_markdown(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--singles", "false", "--cuts", "image", "--weights", "plain"]
    assert main(["frontier", *options, *TINY["frontier"]]) == 0
    out = capsys.readouterr().out
    lines = [line for line in out.splitlines() if line.startswith("|")]
    assert len(lines) == 3
    assert len({len(line) for line in lines}) == 1
    assert "### image, plain weights" in out


def test_the_use_of_a_run_has_its_children() -> None:
    """Children that have ended count too, in ticks of 10 ms; these do no work of the pipeline."""
    busy = "import time\nwhile time.process_time() < 0.3: pass"
    before = usage(os.getpid())
    subprocess.run([sys.executable, "-c", busy], check=True)
    after = usage(os.getpid())
    assert after.cpu - before.cpu >= 0.25
    assert after.wall - before.wall >= 0.25
    waiting = subprocess.Popen(
        [sys.executable, "-c", f"{busy}\nprint(flush=True)\ninput()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert waiting.stdout is not None
    waiting.stdout.readline()
    assert usage(os.getpid()).daemons - after.daemons >= 0.25
    waiting.communicate(b"\n")


def test_an_unknown_bench_is_named() -> None:
    with pytest.raises(UserError, match=r"no bench 'frontie' \(did you mean"):
        main(["frontie"])
