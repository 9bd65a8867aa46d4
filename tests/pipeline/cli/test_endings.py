"""Each command ends on the next one, which runs as it stands; numbers are rounded."""

from __future__ import annotations

import json
import logging
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import BaseModel

import jobs.evaluate
import jobs.experiments.matrix
import jobs.export
import jobs.pretrain.autoencoder
import jobs.pretrain.self_distill
import jobs.sample
import jobs.train_haste
import pipeline.convert.__main__ as conversion
import pipeline.doctor.__main__ as doctor
import pipeline.extract.__main__ as extraction
import pipeline.inspect.__main__ as inspection
from jobs.experiments.page import PageConfig
from pipeline.cli import next_step
from pipeline.cli.next_step import command_line, without_options
from pipeline.cli.options import parse_options
from pipeline.cli.yaml12 import dump_yaml
from pipeline.evaluate.options import check_options as check_evaluation
from pipeline.extract.job import ExtractionSummary
from pipeline.inspect.check import Answer
from pipeline.sampling.grid import GridSummary
from pipeline.sampling.job import SampleSummary
from pipeline.sampling.options import check_options as check_sampling
from pipeline.store import Store
from pipeline.text import rounded
from schemas.evaluate import EvaluateConfig
from schemas.extract import PRESETS, ExtractConfig
from schemas.inspect import InspectConfig
from schemas.report import ReportConfig
from schemas.run import RunConfig
from schemas.sample import SampleConfig

ROOT = Path(__file__).parents[3]
SAMPLES = "jobs/sample.py"


@pytest.fixture(autouse=True)
def all_messages(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.chdir(ROOT)


def parse(model: type[BaseModel], words: list[str], **options: Any) -> Any:
    return parse_options(model, words, command="test", about="", **options)


PARSERS: dict[str, Callable[[list[str]], Any]] = {
    "pipeline.inspect": lambda words: parse(
        InspectConfig, inspection._with_shipped(words), positional="store"
    ),
    "pipeline.report": lambda words: parse(ReportConfig, words, positional="runs"),
    "pipeline.extract": lambda words: parse(
        ExtractConfig, words, presets=PRESETS, preset_key="dataset"
    ),
    "jobs/train_haste.py": lambda words: parse(RunConfig, words),
    "jobs/sample.py": lambda words: parse(SampleConfig, words),
    "jobs/evaluate.py": lambda words: parse(EvaluateConfig, words),
}
"""The real parser of each command that others propose."""


def proposed(caplog: pytest.LogCaptureFixture) -> dict[str, Any]:
    """Programs of the proposed commands and their options, parsed."""
    lines = [re.fullmatch(r"next, [^:]+: (.+)", text) for text in caplog.messages]
    found = {}
    for line in filter(None, lines):
        python, program, *words = shlex.split(line[1])
        if program == "-m":
            program, *words = words
        assert python in {"python", sys.executable}
        assert (ROOT / program).is_file() or program.startswith("pipeline.")
        found[program] = PARSERS[program](words) if program in PARSERS else words
    return found


def test_numbers_have_four_digits() -> None:
    values = {"a": 0.46642331359540246, "b": [1234567.8, 3], "c": None, "d": "0.46642331"}
    expected = {"a": 0.4664, "b": [1235000.0, 3], "c": None, "d": "0.46642331"}
    assert rounded(values) == expected


def test_an_extraction_names_the_check_and_the_training(
    known_store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    done = ExtractionSummary(0, 0.0, known_store)
    monkeypatch.setattr("pipeline.extract.job.extract", lambda config: done)
    assert extraction.main(["--store", known_store.url]) == 0
    assert f"python -m pipeline.inspect {known_store.url} --check" in caplog.text
    assert f"jobs/train_haste.py --config CONFIG.yaml --store {known_store.url}" in caplog.text


def test_an_extraction_of_quickstart_names_its_training(
    known_store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    train = Path(known_store.url).parent / "train.yaml"
    done = ExtractionSummary(0, 0.0, known_store)
    monkeypatch.setattr("pipeline.extract.job.extract", lambda config: done)
    for store, programs in (
        (known_store.url, ["jobs/train_haste.py"]),
        ("another", ["pipeline.inspect", "jobs/train_haste.py"]),
    ):
        train.write_text(dump_yaml({"store": store, "steps": 7}))
        caplog.clear()
        assert extraction.main(["--store", known_store.url]) == 0
        assert [name for name in programs if name in caplog.text] == programs
        assert ("--check" in caplog.text) == (store == "another")
    train.write_text(dump_yaml({"store": known_store.url, "steps": 7}))
    caplog.clear()
    assert inspection.main([known_store.url]) == 0
    assert proposed(caplog)["jobs/train_haste.py"].steps == 7
    train.unlink()


def test_a_conversion_names_the_verification(
    known_store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    done = SimpleNamespace(store=known_store, shards=1, bytes_before=2.0, bytes_after=1.0)
    monkeypatch.setattr("pipeline.convert.request.open_source", lambda config: None)
    monkeypatch.setattr("pipeline.convert.job.convert", lambda config: done)
    assert conversion.main(["a", known_store.url]) == 0
    assert proposed(caplog)["pipeline.inspect"].verify


def test_an_inspection_names_the_check_and_the_check_a_training(
    known_store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert inspection.main([known_store.url]) == 0
    check = proposed(caplog)["pipeline.inspect"]
    assert (check.store, check.check) == (known_store.url, (str(inspection.SHIPPED),))
    config = str(ROOT / "jobs" / "configs" / "demo.yaml")
    answers = [
        Answer("no.yaml", False, settings=(("steps", "3"),)),
        # which is not an option
        Answer("no.yaml", True, settings=(("alignment.others.0.stream", "b"),)),
        Answer(config, True, settings=(("steps", "5"),)),
    ]
    monkeypatch.setattr("pipeline.inspect.check.check_configs", lambda *_: answers)
    caplog.clear()
    assert inspection.main([known_store.url, "--check", config]) == 1
    training = proposed(caplog)["jobs/train_haste.py"]
    assert (training.store, training.name, training.steps) == (known_store.url, "demo", 5)
    (Path(known_store.url) / "commits" / "shard-000000.json").unlink()
    caplog.clear()
    assert inspection.main([known_store.url]) == 0
    assert proposed(caplog) == {}


@pytest.mark.parametrize("captions", [False, True])
def test_a_training_names_sampling_and_report(
    captions: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    summary: dict[str, Any] = {"steps": 20, "steps_per_second": {"phase1": 3.806062081268535}}
    monkeypatch.setattr(jobs.train_haste, "train_run", lambda config: summary)
    monkeypatch.setattr("pipeline.sampling.options.require_checkpoint", lambda checkpoint: None)
    model = ["--student.model", "MMDiT-24", "--diffusion.text-stream", "text_b"] if captions else []
    options = ["--output", "my runs/", "--name", "a", "--store", "s3://a/b", *model]
    assert jobs.train_haste.main(options) == 0
    assert json.loads(capsys.readouterr().out)["steps_per_second"] == {"phase1": 3.806}
    found = proposed(caplog)
    check_sampling(found[SAMPLES])
    assert (found[SAMPLES].checkpoint, found[SAMPLES].png) == ("my runs/a", "samples.png")
    assert found[SAMPLES].store == ("s3://a/b" if captions else None)
    assert found[SAMPLES].text.stream == ("text_b" if captions else None)
    assert found["pipeline.report"].runs == ("my runs/a",)


def test_sampling_names_the_evaluation(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    png = str(tmp_path / "a.png")
    monkeypatch.setattr("pipeline.sampling.options.require_checkpoint", lambda checkpoint: None)
    monkeypatch.setattr("pipeline.sampling.grid.draw_grid", lambda config: GridSummary(8, png, 1.0))
    grid = ["--checkpoint", "x", "--classes", "1,2", f"--png={png}", "--per-class", "3", "--json"]
    assert jobs.sample.main([*grid, "--sampler.guidance", "2"]) == 0
    many = proposed(caplog)[SAMPLES]
    check_sampling(many)
    assert (many.num, many.npz, many.png, many.classes) == (50_000, "samples.npz", None, None)
    assert many.sampler.guidance == 2
    (tmp_path / "grid.yaml").write_text(dump_yaml({"checkpoint": "x", "png": png}))
    caplog.clear()
    assert jobs.sample.main(["--config", str(tmp_path / "grid.yaml")]) == 0
    check_sampling(proposed(caplog)[SAMPLES])
    slow = GridSummary(8, png, 8.0)
    monkeypatch.setattr("pipeline.sampling.grid.draw_grid", lambda config: slow)
    assert jobs.sample.main(grid) == 0
    assert "images for a Fréchet distance in 17 min: " in caplog.text
    assert proposed(caplog)[SAMPLES].num == 1000
    npz = str(tmp_path / "b.npz")
    summary = SampleSummary(8, npz, None, 1.0, 8.0, "random", 0)
    monkeypatch.setattr("pipeline.sampling.job.sample_many", lambda config: summary)
    assert jobs.sample.main(["--checkpoint", "x", "--num", "8", "--npz", npz]) == 0
    assert f"jobs/evaluate.py --samples {npz} --reference STORE_OR_FILE" in caplog.text
    assert "--resolution N" in caplog.text
    run = tmp_path / "a run"
    (run / "checkpoint-000000007").mkdir(parents=True)
    (run / "config.yaml").write_text(dump_yaml({"store": str(tmp_path)}))
    Path(npz).touch()
    monkeypatch.setattr("pipeline.evaluate.options.Archive", lambda *_: None)
    for checkpoint in (run, run / "checkpoint-000000007"):
        caplog.clear()
        assert jobs.sample.main(["--checkpoint", str(checkpoint), "--num", "8", "--npz", npz]) == 0
        evaluation = proposed(caplog)["jobs/evaluate.py"]
        assert check_evaluation(evaluation) == str(tmp_path)
        assert evaluation.record == str(run)


def test_an_evaluation_names_the_report(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    shown = SimpleNamespace(model_dump=dict, model_dump_json=lambda: "{}")
    monkeypatch.setattr("pipeline.evaluate.options.check_options", lambda config: "")
    for result, options, program in (
        (shown, ["--samples", "a", "--record", "runs/a"], "pipeline.report"),
        (None, ["--save-reference", "b.npz", "--max-images", "9"], "jobs/evaluate.py"),
    ):
        monkeypatch.setattr(
            "pipeline.evaluate.evaluator.evaluate", lambda *_, result=result: result
        )
        caplog.clear()
        assert jobs.evaluate.main(["--reference", "r", *options]) == 0
        found = proposed(caplog)[program]
    assert (found.reference, found.samples, found.max_images) == ("b.npz", "samples.npz", 9)
    assert found.save_reference is None


@pytest.mark.parametrize("family", ["SiT", "MMDiT"])
def test_an_export_names_pictures_from_the_file(
    family: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    state = SimpleNamespace(config=SimpleNamespace(student=SimpleNamespace(family=family)))
    monkeypatch.setattr(jobs.export, "find_checkpoint", lambda checkpoint: str(tmp_path))
    monkeypatch.setattr("pipeline.checkpoints.export.export_checkpoint", lambda *_: None)
    monkeypatch.setattr("pipeline.checkpoints.state.read_state", lambda folder: state)
    monkeypatch.setattr("pipeline.sampling.options.require_checkpoint", lambda checkpoint: None)
    assert jobs.export.main(["--checkpoint", "x", "--out", str(tmp_path / "a.pt")]) == 0
    sampling = proposed(caplog)[SAMPLES]
    check_sampling(sampling)
    assert sampling.checkpoint == str(tmp_path / "a.pt")
    assert (sampling.caption is not None) == (family == "MMDiT")


def test_an_examined_cluster_gets_its_training(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    status = "ok"
    monkeypatch.setattr(
        "pipeline.doctor.examination.examine", lambda *_, **__: [SimpleNamespace(status=status)]
    )
    monkeypatch.setattr("pipeline.doctor.findings.describe", lambda findings: "")
    options = ["--store", "s3://a/b", "--workers", "3", "--read-seconds", "1", "--steps", "9"]
    more = ["--models", "--extract.dataset", "demo", "--plan.runs=2", "--extract.codec=small"]
    monkeypatch.setattr("pipeline.store.Store.exists", lambda url: True)
    assert doctor.main([*options, *more]) == 0
    training = proposed(caplog)["jobs/train_haste.py"]
    assert (training.store, training.workers.count, training.steps) == ("s3://a/b", 3, 9)
    caplog.clear()
    assert doctor.main(options[:4]) == 0
    assert list(proposed(caplog)) == ["pipeline.inspect"]  # the default run may not fit the store
    monkeypatch.setattr("pipeline.store.Store.exists", lambda url: False)
    caplog.clear()
    assert doctor.main([*options, *more]) == 0
    extracted = proposed(caplog)["pipeline.extract"]
    assert (extracted.store, extracted.dataset, extracted.codec.name) == (
        "s3://a/b",
        "demo",
        "small",
    )
    config = tmp_path / "train.yaml"
    for extracts in (False, True):
        file: dict[str, Any] = {"extract": {"dataset": "demo"}} if extracts else {"steps": 9}
        config.write_text(dump_yaml(file))
        caplog.clear()
        assert doctor.main([*options, "--config", str(config), "--ray-address", "auto"]) == 0
        found = proposed(caplog)
        if extracts:  # the extraction has no file of its own
            assert found == {}
        else:
            assert found["pipeline.extract"].ray_address == "auto"
    caplog.clear()
    status = "fail"
    assert doctor.main(options) == 1
    assert proposed(caplog) == {}


def test_an_experiment_names_its_page(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("jobs.experiments.experiment.run_matrix", lambda config: ("", []))
    config = ["--config", "jobs/experiments/digits.yaml", "--output", "runs/digits"]
    assert jobs.experiments.matrix.main(config) == 0
    words = proposed(caplog)["jobs/experiments/page.py"]
    with pytest.raises(SystemExit):
        parse(PageConfig, words)


def test_a_pretraining_names_an_extraction_with_its_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "of mine"
    report = SimpleNamespace(model_dump_json=lambda indent: "{}")
    network = SimpleNamespace(parameters=lambda: [], save_pretrained=lambda path: None)
    module = "pipeline.pretrain.self_distillation"
    monkeypatch.setattr(
        "pipeline.pretrain.kl_autoencoder.train_autoencoder", lambda *_: (network, report)
    )
    monkeypatch.setattr(f"{module}.self_distill", lambda *_: network)
    monkeypatch.setattr(f"{module}.knn_accuracies", lambda *_: {})
    monkeypatch.setattr(f"{module}.save_teacher", lambda *_: None)
    assert jobs.pretrain.autoencoder.main(["--out", str(path)]) == 0
    assert proposed(caplog)["pipeline.extract"].autoencoder == str(path)
    caplog.clear()
    assert jobs.pretrain.self_distill.main(["--out", str(path)]) == 0
    assert proposed(caplog)["pipeline.extract"].teacher.weights == str(path)


def test_lines_run_in_other_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None, raising=False)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    for program in ("pipeline.report", "jobs/export.py"):
        line = command_line(program, "--help")
        done = subprocess.run(["sh", "-c", line], capture_output=True, text=True, env=environment)
        assert done.stdout.startswith("usage: "), done.stderr
    assert next_step.ROOT == ROOT


def test_credentials_are_not_in_a_proposed_line(caplog: pytest.LogCaptureFixture) -> None:
    next_step.log_next("it", "jobs/sample.py", "--checkpoint", "s3://user:hidden-word@host/run")
    assert "s3://" in caplog.text
    assert "hidden-word" not in caplog.text


def test_options_are_left_out_with_their_values() -> None:
    argv = ["a", "--png", "x", "--per-class=3", "--sampler.steps", "5", "--plan.x", "1", "2"]
    assert without_options(argv, {"png", "per_class", "plan"}) == ["a", "--sampler.steps", "5"]
