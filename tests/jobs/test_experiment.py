"""The CIFAR-10 experiment with tiny settings: all of its steps, each made once."""

from __future__ import annotations

import io
import json
import shutil
import signal
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import timm
import torch
from markupsafe import escape
from PIL import Image
from safetensors.torch import load_file

from jobs.experiments.artifacts import ArtifactCache, collect, read_images
from jobs.experiments.experiment import _start_without_interrupts, run_matrix
from jobs.experiments.judge import Judge
from jobs.experiments.options import CONFIGS, MatrixConfig
from jobs.experiments.results import (
    cosine_table,
    differences_table,
    final_table,
    tables,
    termination_table,
)
from pipeline.cli.config_files import merge, read_yaml
from pipeline.runs.metrics import read_metrics
from pipeline.storage.locks import exclusive_lock
from pipeline.store import Store
from schemas.errors import UserError
from schemas.run import RunConfig

CIFAR, CPU, SHORT, DIGITS = (
    CONFIGS / f"{name}.yaml" for name in ("cifar10", "cifar10_cpu", "cifar10_short", "digits")
)
TINY: dict[str, Any] = {
    "held_out": 6,
    "device": "cpu",
    "threads": 1,
    "teacher": {
        "backbone": {"embed_dim": 24, "num_heads": 2},
        "steps": 2,
        "batch_size": 8,
        "prototypes": 16,
        "hidden": 16,
    },
    "autoencoder": {"widths": [8, 8], "steps": 2, "batch_size": 8},
    "judge": {"name": "resnet10t", "steps": 2, "batch_size": 8},
    "store": {"shard_size": 20, "batch_size": 20},
    "run": {
        "steps": 4,
        "global_batch": 8,
        "log_every": 1,
        "student": {"width": 24, "heads": 2, "depth": 5},
        "alignment": {"projector_width": 16},
        "checkpoint": {"every": 2},
        "validation": {"every": 1, "samples": 10, "batch_size": 5, "times": [0.5]},
        "samples": {"every": 4, "per_class": 1, "batch_size": 10, "sampler": {"steps": 1}},
    },
    "measure": {"images": 10, "batch_size": 10, "sampler": {"steps": 1}},
    "arms": {
        "haste": {"alignment": {"termination": {"step": 2}}},
        "repa_terminated": {"alignment": {"termination": {"step": 2}}},
    },
    "processes": 1,
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten classes of twelve noise images, in the layout of CIFAR-10's zip."""
    path = tmp_path_factory.mktemp("cifar") / "images.zip"
    rng = np.random.default_rng(0)
    with zipfile.ZipFile(path, "w") as zipped:
        for kind in range(10):
            for number in range(12):
                pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                buffer = io.BytesIO()
                Image.fromarray(pixels).save(buffer, "PNG")
                zipped.writestr(f"train/class{kind}/{number:04d}.png", buffer.getvalue())
    return path


def config_of(source: Path, work: Path, /, **changes: Any) -> MatrixConfig:
    places = {"source": str(source), "output": str(work)}
    return MatrixConfig.model_validate(merge(merge(read_yaml(CPU), TINY), places | changes))


@pytest.fixture(scope="module")
def done(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The --output folder of two arms with one seed."""
    work = tmp_path_factory.mktemp("work")
    found = run_matrix(config_of(source, work, select=["vanilla", "haste"]))
    assert found == (work / "table.md", [])
    return work


def test_arms_differ_in_the_options_that_their_names_state() -> None:
    expected = {
        "vanilla": (0, 0, None),
        "repa": (0.5, 0, "gradient_cosine"),
        "repa_terminated": (0.5, 0, "fixed"),
        "atta": (0, 0.5, "gradient_cosine"),
        "haste_always": (0.5, 0.5, "gradient_cosine"),
        "haste": (0.5, 0.5, "fixed"),
    }
    for file in (CIFAR, CPU, SHORT, DIGITS):
        config = MatrixConfig.model_validate(read_yaml(file))
        runs = {
            arm: RunConfig.model_validate(
                merge(merge(config.run, changes), {"validation": {"store": "x"}})
            )
            for arm, changes in config.arms.items()
        }
        found = {
            arm: (
                run.alignment.feature_weight,
                run.alignment.attention_weight,
                run.alignment.termination and run.alignment.termination.kind,
            )
            for arm, run in runs.items()
        }
        assert {arm: found[arm] for arm in expected} == expected
        for run in runs.values():
            end = run.alignment.termination
            assert end is None or end.dry == (end.kind == "gradient_cosine")
        for ended, always in config.pairs.items():  # they differ in the termination alone
            same = {"alignment": {"termination": None}}
            values = [merge(merge(config.run, config.arms[arm]), same) for arm in (ended, always)]
            assert values[0] == values[1]
        assert len(range(0, runs["haste"].steps, runs["haste"].checkpoint.every)) >= 1


def test_results_have_every_arm_at_every_step(done: Path) -> None:
    values = json.loads((done / "results.json").read_text())
    assert [run["arm"] for run in values["runs"]] == list(values["facts"]["settings"]["arms"])
    for run in values["runs"]:
        own = run["arm"] in ("vanilla", "haste")
        for key in ("frechet", "agreement", "precision", "recall"):
            assert list(run[key]) == (["2", "4"] if own else [])
        assert list(run["validation"]) == (["1", "2", "3", "4"] if own else [])
        assert run["failed"] is None
        assert run["termination_step"] == (2 if run["arm"] == "haste" else None)
    facts = values["facts"]
    assert 0 <= facts["nearest_neighbours"]["class"] <= 1
    assert 0 <= facts["real_images"]["agreement"] <= 1
    text = (done / "table.md").read_text()
    assert text == tables(values)
    assert "| haste | 1 of 1 |" in text
    assert "| repa | 0 of 1 | - | - |" in text
    assert Image.open(done / "curves.png").size[0] > 400
    page = (done / "report.html").read_text()
    assert page.count("haste-seed0") > 1
    own = page.partition("<h2>Comparison of the arms</h2>")[2].partition("<h2>")[0]
    for table in (final_table, differences_table, termination_table, cosine_table):
        assert all(escape(cell) in own for row in table(values)[1] for cell in row)
    assert own.count("data:image/png;base64,") == 1 + (done / "cosine.png").exists()


def test_measurements_are_those_of_the_formulas(source: Path, done: Path) -> None:
    """Numbers of the last checkpoint, sampled and measured again in NumPy."""
    config = config_of(source, done)
    train = read_images(done / "images" / "train", 32)
    judge = Judge(done / "judge", config.judge, config.measure, train, "cpu")
    store = Store.open(str(done / "store_train"))
    images = judge.sample(done / "runs" / "haste-seed0" / "checkpoint-000000004", store)
    assert images.labels.tolist() == list(range(10))
    model = timm.create_model("resnet10t", num_classes=10)
    model.load_state_dict(load_file(done / "judge" / "judge.safetensors"))
    model.eval()
    kept: list[torch.Tensor] = []
    model.fc.register_forward_pre_hook(lambda _, inputs: kept.append(inputs[0].detach()))
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    found = []
    for pixels in (images.pixels, train.pixels):
        with torch.no_grad():
            scores = model((pixels / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1))
        found.append(scores.argmax(1))
    ours, real = (features.double().numpy() for features in kept)
    shift = ((ours.mean(0) - real.mean(0)) ** 2).sum()
    one, other = np.cov(ours.T), np.cov(real.T)
    root = scipy.linalg.sqrtm(one @ other).real
    row = json.loads((done / "judged" / "haste-seed0.json").read_text())["rows"]["4"]
    distance = shift + np.trace(one + other - 2 * root)
    assert row["frechet"] == pytest.approx(distance, rel=1e-3)
    assert row["agreement"] == (found[0] == images.labels).double().mean().item()
    gaps = np.linalg.norm(real[:, None] - real[None], axis=2)
    radii = np.sort(gaps, 1)[:, 3]
    inside = (np.linalg.norm(ours[:, None] - real[None], axis=2) <= radii).any(1)
    assert row["precision"] == inside.mean()


def test_held_out_images_are_not_in_the_store_and_all_runs_share_it(done: Path) -> None:
    assert len(list((done / "images" / "train").rglob("*.png"))) == 60
    assert len(list((done / "images" / "held_out").rglob("*.png"))) == 60
    manifest = json.loads((done / "store_train" / "manifest.json").read_text())
    assert manifest["dataset"]["samples"] == 60
    phases = {
        arm: [
            row["phase"]
            for row in read_metrics(done / "runs" / f"{arm}-seed0" / "metrics.jsonl")
            if "event" not in row
        ]
        for arm in ("vanilla", "haste")
    }
    assert phases == {"vanilla": [2, 2, 2, 2], "haste": [1, 1, 2, 2]}


def test_a_second_call_makes_nothing(source: Path, done: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in done.rglob("*.safetensors")}
    run_matrix(config_of(source, done, select=["vanilla", "haste"]))
    assert before == {path: path.stat().st_mtime_ns for path in done.rglob("*.safetensors")}


def test_an_artifact_of_other_options_is_refused(source: Path, done: Path) -> None:
    with pytest.raises(UserError, match=r"the teacher in '.*' was made with another steps"):
        run_matrix(config_of(source, done, teacher={**TINY["teacher"], "steps": 3}))


def test_a_store_of_other_layers_is_refused(source: Path, done: Path) -> None:
    with pytest.raises(UserError, match=r"store '.*/store_train' was made with"):
        run_matrix(config_of(source, done, store={**TINY["store"], "layers": [2, 3, 4, 5]}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"select": ["hast"]}, r"--select hast: the arms are vanilla, repa"),
        ({"source": None}, r"--source is missing"),
        ({"source": "/nowhere.zip"}, r"--source '/nowhere.zip' does not exist"),
        ({"arms": {"haste": {"alignment": {"student_layer": [1]}}}}, r"the arm 'haste'"),
        ({"arms": {"haste": {"steps": 20}}}, r"the arm 'haste' has another steps than 'vanilla'"),
        ({"arms": {"haste": {"validation": {"every": 2}}}}, r"another validation than 'vanilla'"),
        ({"seeds": (1, 1)}, r"--seeds names 1 twice"),
        ({"pairs": {"haste": "hast"}}, r"pairs names hast: the arms are"),
        ({"streams": {"random": {"layer": 3}}}, r"the stream 'random'"),
        ({"store": {"shard_sizes": 20}}, r"the table 'store'"),
        ({"seeds": ()}, r"--seeds is empty"),
        ({"held_out": 12}, r"more than 12 images of each class; found 10 classes"),
    ],
)
def test_bad_options_are_named(
    source: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        run_matrix(config_of(source, tmp_path, **changes))
    assert not list(tmp_path.rglob("about.json"))


def test_a_config_without_measurements_is_refused(source: Path, tmp_path: Path) -> None:
    places = {"source": str(source), "output": str(tmp_path / "out")}
    with pytest.raises(UserError, match=r"there are no arms"):
        run_matrix(MatrixConfig.model_validate(places))
    with pytest.raises(UserError, match=r"run.validation.every is missing"):
        run_matrix(MatrixConfig.model_validate(places | {"arms": {"vanilla": {}}}))
    assert not (tmp_path / "out").exists()


def test_a_run_that_fails_is_shown_and_hides_no_other(source: Path, done: Path) -> None:
    """And is trained again by the same command."""
    arms: dict[str, Any] = {"broken": {"optimizer": {"learning_rate": 1e30}}}
    output = done.parent / "failing"
    shutil.copytree(done, output, ignore=shutil.ignore_patterns("runs", "judged", "running"))
    config = config_of(source, output, arms=arms, select=["broken"])
    table, failed = run_matrix(config)
    assert failed == ["broken-seed0"]
    text = table.read_text()
    assert "| broken | 0 of 1, 1 failed | - |" in text
    assert "Failed: broken, seed 0: run 'broken-seed0' stopped:" in text
    shutil.rmtree(output / "runs" / "broken-seed0")
    config = config_of(source, output, arms={"broken": {}}, select=["broken"])
    table, failed = run_matrix(config)
    assert failed == []
    assert "failed" not in table.read_text().lower()


def test_a_damaged_image_is_named(source: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.zip"
    with zipfile.ZipFile(source) as whole, zipfile.ZipFile(damaged, "w") as zipped:
        for name in whole.namelist():
            data = whole.read(name)
            zipped.writestr(name, data[:60] if name.endswith("class3/0002.png") else data)
    with pytest.raises(UserError, match=r"'.*class3/0002.png' cannot be used"):
        run_matrix(config_of(damaged, tmp_path / "work"))


def test_a_folder_is_split_by_name(source: Path, tmp_path: Path) -> None:
    """The last names are held out; images of one name in two folders of a class are refused."""
    with zipfile.ZipFile(source) as zipped:
        zipped.extractall(tmp_path)
    folder = tmp_path / "train"
    collect(str(folder), 2, 32, tmp_path / "split")
    held_out = sorted(path.name for path in (tmp_path / "split/held_out/class3").iterdir())
    assert held_out == ["0010.png", "0011.png"]
    inner = folder / "class3" / "inner"
    inner.mkdir()
    shutil.copy(folder / "class3" / "0000.png", inner)
    with pytest.raises(UserError, match=r"'class3/inner/0000.png' is in a folder inside a class"):
        collect(str(folder), 2, 32, tmp_path / "again")


def test_a_run_that_another_process_trains_is_refused(source: Path, done: Path) -> None:
    busy = done / "running" / "repa-seed0"
    with (
        exclusive_lock(busy, what="it", remedy="wait"),
        pytest.raises(
            UserError, match=r"the run 'repa-seed0' in --output '.*' is being written by"
        ),
    ):
        run_matrix(config_of(source, done, select=["repa"]))


def test_one_process_at_a_time_makes_artifacts(tmp_path: Path) -> None:
    """And temporary folders of killed processes are removed."""
    cache = ArtifactCache(tmp_path / "work")
    (tmp_path / "work" / ".tmp-killed").mkdir(parents=True)

    def make(folder: Path) -> dict[str, Any]:
        with pytest.raises(UserError, match=r"--output '.*' is being written by process \d+"):
            ArtifactCache(tmp_path / "work").get("other", {}, lambda _: {})
        return {"made": folder.name}

    final, report = cache.get("thing", {"size": 1}, make)
    assert report["made"].startswith(".tmp-")
    assert sorted(path.name for path in final.parent.iterdir()) == ["thing"]


class FakeProcess:
    """Notes the blocked signals with which it is started."""

    def start(self) -> None:
        self.blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_a_terminals_interrupt_does_not_reach_processes_of_runs() -> None:
    """A started process inherits the blocked signals."""
    process = FakeProcess()
    _start_without_interrupts(process)  # type: ignore[arg-type]
    assert signal.SIGINT in process.blocked
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


@pytest.mark.slow  # it trains four arms on digits, in processes of their own
@pytest.mark.timeout(900)
def test_digits_in_two_processes_are_those_of_one(tmp_path: Path) -> None:
    values = merge(read_yaml(DIGITS), TINY)
    del values["teacher"], values["autoencoder"]
    values["judge"] = {**values["judge"], "flip": False}
    values["run"]["student"] = {**values["run"]["student"], "width": 24, "heads": 4}
    values |= {"held_out": 150, "select": ["vanilla", "haste", "control", "reg"], "seeds": [0]}
    values["store"] = {"shard_size": 128, "codec": "float16"}
    found = []
    for processes in (1, 2):
        output = tmp_path / str(processes)
        if processes == 2:  # on the same store
            made = shutil.ignore_patterns("runs", "judged", "running")
            shutil.copytree(tmp_path / "1", output, ignore=made)
        options = values | {"processes": processes, "output": str(output)}
        _, failed = run_matrix(MatrixConfig.model_validate(options))
        assert failed == []
        found.append(json.loads((output / "results.json").read_text())["runs"])
    assert found[0] == found[1]
    measured = [run for run in found[0] if run["frechet"]]
    assert [run["arm"] for run in measured] == ["vanilla", "haste", "control", "reg"]
    nearest = json.loads((tmp_path / "1" / "results.json").read_text())["facts"]
    teacher, control = (nearest["nearest_neighbours"][name] for name in ("class", "control_class"))
    assert teacher > 0.9 > control
