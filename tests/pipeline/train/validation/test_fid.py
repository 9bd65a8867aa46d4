"""The small Fréchet distance that a run measures during training."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import patch

import fsspec
import pytest
import torch
from pydantic import ValidationError

from pipeline.autoencoders import Autoencoder
from pipeline.checkpoints.local import LocalCheckpoints, latest_checkpoint
from pipeline.checkpoints.student import load_student
from pipeline.cli.config_files import merge
from pipeline.distributed.signals import StopRequest
from pipeline.evaluate.evaluator import evaluate
from pipeline.evaluate.features.timm_network import FeatureNetwork
from pipeline.evaluate.frechet import Factored, FeatureStatistics, frechet_distance
from pipeline.evaluate.images.store import StoreImages
from pipeline.runs.directory import RunFolder
from pipeline.runs.evaluations import record_evaluation
from pipeline.runs.metrics import read_metrics
from pipeline.sampling.batches import choose_labels, plan_batches
from pipeline.sampling.generate import draw_images
from pipeline.sampling.job import describe_images
from pipeline.sampling.outputs import FolderOutput
from pipeline.sampling.worker import SampleWorker
from pipeline.store import Store
from pipeline.train.loop import train
from pipeline.train.validation.fid import RunEvaluation
from schemas.errors import StoppedError, UserError
from schemas.evaluate import EvaluateConfig, Evaluation, RecordedEvaluation
from schemas.run import RunConfig
from schemas.sample import SampleConfig
from tests.processes import train_on
from tests.stores import tiny_run

NETWORK = {"network": "resnet10t", "network_weights": "random", "network_size": 32}


@pytest.fixture(scope="module")
def reference(digits_store: Store, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("reference") / "digits.npz"
    asked = {"reference": digits_store.url, "save_reference": str(path), **NETWORK}
    evaluate(EvaluateConfig.model_validate(asked), "cpu")
    return path


@pytest.fixture
def config(digits_store: Store, reference: Path) -> RunConfig:
    """Four steps of a tiny student without a teacher; a distance after the third and the last."""
    changes: dict[str, Any] = {
        "store": digits_store.url,
        "steps": 4,
        "student": {"num_classes": 10},
        "alignment": {"feature_weight": 0, "attention_weight": 0, "termination": None},
        "checkpoint": {"every": 3, "keep": 9},
        "samples": {
            "batch_size": 4,
            "sampler": {"method": "ode", "steps": 2, "seed": 3},
            "evaluate": {"images": 10, "every": 3, "reference": str(reference), **NETWORK},
        },
    }
    return RunConfig.model_validate(merge(tiny_run(), changes))


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "evaluations.jsonl").read_text().splitlines()]


def test_distance_is_that_of_samples_of_the_averaged_weights(
    config: RunConfig, digits_store: Store, tmp_path: Path
) -> None:
    train_on(1, config, tmp_path / "run")
    rows = rows_of(tmp_path / "run")
    assert [(row["step"], row["samples"], row["network"]) for row in rows] == [
        (3, 10, "resnet10t"),
        (4, 10, "resnet10t"),
    ]
    student, state = load_student(tmp_path / "run" / "checkpoint-000000003")
    vae = Autoencoder(state.autoencoder.name)
    labels = choose_labels("random", range(10), 3, 0, 10)
    images = torch.cat(
        [
            draw_images(student, vae, labels[i : i + 4], config.samples.sampler, first_index=i)
            for i in range(0, 10, 4)
        ]
    )
    network = FeatureNetwork("resnet10t", "random", size=32)
    drawn, real = FeatureStatistics(network.width), FeatureStatistics(network.width)
    drawn.add(network.features(images))
    for batch in StoreImages(digits_store.url).batches(8):
        real.add(network.features(batch))
    assert rows[0]["fid"] == pytest.approx(frechet_distance(drawn, real), rel=1e-5)
    assert rows[0]["fid"] > 0
    events = [row for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if "fid" in row]
    assert [row["fid"] for row in events] == [row["fid"] for row in rows]


def test_a_run_factors_its_reference_once(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    factored = []
    of = Factored.of
    monkeypatch.setattr(Factored, "of", lambda m, device=None: factored.append(m) or of(m, device))
    train_on(1, config, tmp_path / "run")
    assert len(rows_of(tmp_path / "run")) == 2
    assert len(factored) == 3  # the reference and the samples of each evaluation


def test_the_same_images_recorded_afterwards_make_the_same_row(
    config: RunConfig, tmp_path: Path
) -> None:
    """Therefore measurements during and after a run share one line of the report."""
    run = tmp_path / "run"
    train_on(1, config, run)
    before = rows_of(run)
    worker, asked = SampleWorker(), SampleConfig(num=10, sampler=config.samples.sampler)
    loaded = worker.load(asked, str(run / "checkpoint-000000003"), "cpu", 1)
    about = describe_images(asked, str(run / "checkpoint-000000003"), loaded)
    output = FolderOutput(str(tmp_path / "samples"))
    output.open(about)
    batches = plan_batches(10, 4)
    labels = choose_labels("random", range(10), 3, 0, 10)
    for batch in batches:
        wanted = labels[batch.first : batch.first + batch.count]
        output.write(worker.draw(batch, wanted, pngs=True))
    output.finish(batches, labels)
    asked_of = {"samples": str(tmp_path / "samples"), "record": str(run), **NETWORK}
    asked_of["reference"] = str(config.samples.evaluate.reference)
    evaluate(EvaluateConfig.model_validate(asked_of), "cpu")
    after = rows_of(run)
    assert [row["step"] for row in after] == [3, 4]
    assert after[0]["precision"] is not None  # the run does not measure it: this is the new row
    new = {key: value for key, value in after[0].items() if key not in ("precision", "recall")}
    assert new == {
        key: pytest.approx(before[0][key], rel=1e-5) if key == "fid" else before[0][key]
        for key in new
    }


def test_workers_measure_the_same_together(config: RunConfig, tmp_path: Path) -> None:
    train_on(1, config, tmp_path / "one")
    train_on(2, config, tmp_path / "two")
    one, two = rows_of(tmp_path / "one"), rows_of(tmp_path / "two")
    assert [row["samples"] for row in two] == [10, 10]
    for mine, theirs in zip(one, two, strict=True):
        assert theirs["fid"] == pytest.approx(mine["fid"], rel=1e-3)


def test_a_resumed_run_has_each_row_once(config: RunConfig, tmp_path: Path) -> None:
    train_on(1, config, tmp_path / "whole")
    train_on(1, config, tmp_path / "run", stop_at=3)
    train_on(1, config, tmp_path / "run")
    assert rows_of(tmp_path / "run") == rows_of(tmp_path / "whole")


# three steps, two batches of the grid, three of the evaluation, and the step boundary behind
WITHIN, BEHIND = 6, 8
BROKEN = 1e39
"""Guidance that float32 does not hold: samples of finite weights overflow."""


@pytest.mark.parametrize(
    ("wishes", "guidance"), [(WITHIN, 1), (WITHIN, BROKEN), (BEHIND, 1), (BEHIND, BROKEN)]
)
def test_a_run_stopped_at_a_validation_has_the_same_rows(
    config: RunConfig, tmp_path: Path, wishes: int, guidance: float
) -> None:
    """Stopped during the validation, which is then repeated, or right after it; with good and
    with broken samples."""
    values = {
        "checkpoint": {"every": 4},
        "samples": {"every": 3, "classes": (1, 4), "sampler": {"guidance": guidance}},
    }
    config = RunConfig.model_validate(merge(config.model_dump(), values))
    whole, folder = tmp_path / "whole", tmp_path / "run"
    train_on(1, config, whole)
    keeper = LocalCheckpoints(folder, keep=9)
    asked = iter([*[StopRequest.GO_ON] * wishes, StopRequest.STOP])
    with pytest.raises(StoppedError, match="after step 3 of 4"):
        train(config, folder, keeper.save, poll=lambda: next(asked))
    assert latest_checkpoint(folder) == folder / "checkpoint-000000003"
    assert (folder / "samples" / "step-000000003.png").exists()
    measured = wishes == BEHIND and guidance == 1
    assert (folder / "evaluations.jsonl").exists() == measured
    train_on(1, config, folder)
    assert rows_without_rates(folder) == rows_without_rates(whole)
    if guidance == 1:
        assert rows_of(folder) == rows_of(whole)


def test_a_run_killed_during_a_validation_repeats_it(config: RunConfig, tmp_path: Path) -> None:
    """The checkpoint is written first. Finished measurements are not repeated."""
    whole, folder = tmp_path / "whole", tmp_path / "run"
    train_on(1, config, whole)

    class Killed(BaseException):
        pass

    keeper, original = LocalCheckpoints(folder, keep=9), RunEvaluation.measure
    with (
        patch.object(RunEvaluation, "measure", side_effect=Killed),
        pytest.raises(Killed),
    ):
        train(config, folder, keeper.save)
    assert latest_checkpoint(folder) == folder / "checkpoint-000000003"
    for expected in ([3, 4], []):
        with patch.object(RunEvaluation, "measure", autospec=True, side_effect=original) as measure:
            train_on(1, config, folder)
        assert [call.args[2] for call in measure.call_args_list] == expected
        assert rows_without_rates(folder) == rows_without_rates(whole)
        assert rows_of(folder) == rows_of(whole)


def test_measurements_of_other_weights_are_not_reused(config: RunConfig, tmp_path: Path) -> None:
    """A run of the same name that was restarted from step 0."""
    folder = tmp_path / "run"
    train_on(1, config, folder)
    stale = rows_of(folder)
    for path in folder.glob("checkpoint-*"):
        shutil.rmtree(path)
    other = config.model_copy(
        update={"optimizer": config.optimizer.model_copy(update={"learning_rate": 0.05})}
    )
    asked = iter(
        [*[StopRequest.GO_ON] * 3, StopRequest.STOP]
    )  # during the first batch of the evaluation
    with pytest.raises(StoppedError, match="after step 3 of 4"):
        train(other, folder, LocalCheckpoints(folder, keep=9).save, poll=lambda: next(asked))
    train_on(1, other, folder)
    train_on(1, other, tmp_path / "whole")
    assert rows_of(folder) == rows_of(tmp_path / "whole")
    assert rows_of(folder) != stale


def rows_without_rates(folder: Path) -> list[Any]:
    """All rows of the metrics without rates."""
    return [
        (
            row["step"],
            row.get("event"),
            str(row.get("fid", row.get("reason", row.get("denoising")))),
        )
        for row in read_metrics(folder / "metrics.jsonl")
    ]


@pytest.mark.parametrize("world_size", [1, 2])
def test_samples_that_overflow_have_no_distance(
    config: RunConfig, tmp_path: Path, world_size: int
) -> None:
    """Its images would be black, and black images have a distance like any other images."""
    values = merge(
        config.model_dump(),
        {
            "ema_decay": 0.5,
            "samples": {"every": 4, "classes": (1,), "sampler": {"guidance": BROKEN}},
        },
    )
    train_on(world_size, RunConfig.model_validate(values), tmp_path / "run")
    assert not (tmp_path / "run" / "evaluations.jsonl").exists()
    events = [row for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if "event" in row]
    assert [(row["step"], row["event"], row["reason"]) for row in events] == [
        (3, "no evaluation", "10 of 10 samples are not made of finite numbers"),
        (4, "broken samples", "4 of 4 samples of the grid are not finite numbers: black"),
        (4, "no evaluation", "10 of 10 samples are not made of finite numbers"),
    ]


def test_a_reference_of_another_network_is_named(config: RunConfig, tmp_path: Path) -> None:
    values = merge(config.model_dump(), {"samples": {"evaluate": {"seed": 1}}})
    with pytest.raises(UserError, match=r"--samples.evaluate.reference '.*' holds statistics of"):
        train_on(1, RunConfig.model_validate(values), tmp_path / "run")


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ({"evaluate": {"images": 10, "every": 5}}, "reference is missing"),
        ({"evaluate": {"images": 10, "reference": "r.npz"}}, "needs evaluate.every"),
        (
            {"every": 5, "evaluate": {"images": 10, "reference": "r.npz", "network": "resnet18"}},
            "network_weights go together",
        ),
    ],
)
def test_half_an_evaluation_is_refused(samples: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        RunConfig.model_validate({"samples": samples})


def test_rows_on_an_object_store_are_added_to(config: RunConfig) -> None:
    """A replacement worker finds the rows of the worker before it, and keeps rows that another
    process recorded meanwhile."""
    filesystem = fsspec.filesystem("memory")
    row = RecordedEvaluation(
        **dict.fromkeys(Evaluation.model_fields) | {"fid": 1.0, "samples": 10, "network": "x"},
        step=3,
        weights="ema",
        reference="r.npz",
    )
    text = row.model_dump_json()
    filesystem.pipe_file("/evaluated/tiny/evaluations.jsonl", text.encode() + b"\n")
    with RunFolder(config.model_copy(update={"output": "memory://evaluated"})) as folder:
        record_evaluation(folder.path, row.model_copy(update={"step": 4}))
        record_evaluation("memory://evaluated/tiny", row.model_copy(update={"step": 9}))
    lines = filesystem.cat_file("/evaluated/tiny/evaluations.jsonl").decode().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [3, 4, 9]


def test_concurrent_recording_loses_no_row(tmp_path: Path) -> None:
    row = RecordedEvaluation(
        **dict.fromkeys(Evaluation.model_fields) | {"fid": 1.0, "samples": 10, "network": "x"},
        step=0,
        weights="ema",
        reference="r.npz",
    )

    def record(first: int) -> None:
        for step in range(first, 60, 3):
            record_evaluation(tmp_path, row.model_copy(update={"step": step}))

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(record, range(3)))
    assert [found["step"] for found in rows_of(tmp_path)] == list(range(60))


def test_measurements_of_a_stopped_run_are_on_its_object_store(config: RunConfig) -> None:
    filesystem = fsspec.filesystem("memory")
    stopped = config.model_copy(update={"output": "memory://stopped"})

    def end(error: Exception, name: str) -> None:
        with RunFolder(stopped) as folder:
            (folder.path / name).write_bytes(b"a picture")
            raise error

    for kind, name, sent in ((StoppedError, "a.png", True), (UserError, "b.png", False)):
        with pytest.raises(kind):
            end(kind("as it is"), name)
        assert filesystem.exists(f"/stopped/tiny/{name}") == sent


def test_requirements_of_the_evaluation_are_checked_before_the_first_step(
    config: RunConfig, tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "evaluations.jsonl").write_text('{"step": 3, "fi')
    with pytest.raises(UserError, match=r"line 1 of '.*evaluations.jsonl' is not an evaluation"):
        train_on(1, config, tmp_path / "run")
    assert not list((tmp_path / "run").glob("checkpoint*"))


def test_options_without_effect_are_refused() -> None:
    for options, message in (
        ({"every": 5}, "images is missing"),
        ({"network_size": 32}, "go with a network"),
    ):
        with pytest.raises(ValidationError, match=message):
            RunConfig.model_validate({"samples": {"evaluate": options}})


def test_workers_receive_absolute_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from jobs.train_haste import for_workers

    monkeypatch.chdir(tmp_path)
    (tmp_path / "decoder").mkdir()
    evaluate = {"images": 5, "reference": "r.npz", "network": "n", "network_weights": "w.pt"}
    samples = {"every": 5, "autoencoder": "decoder", "evaluate": evaluate}
    config = for_workers(
        RunConfig.model_validate(
            {"store": "s3://bucket/store", "data": {"cache_dir": "cache"}, "samples": samples}
        )
    )
    assert config.output == str(tmp_path / "runs")
    assert config.data.cache_dir == str(tmp_path / "cache")
    assert config.store == "s3://bucket/store"
    assert config.samples.autoencoder == str(tmp_path / "decoder")
    assert config.samples.evaluate.reference == str(tmp_path / "r.npz")
    assert config.samples.evaluate.network_weights == str(tmp_path / "w.pt")


def test_short_memory_names_the_option(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def draw_latents(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("pipeline.train.validation.sampling.draw_latents", draw_latents)
    with pytest.raises(UserError, match=r"no memory for 4 samples .* --samples.batch-size than 4"):
        train_on(1, config, tmp_path / "run")
