"""The CIFAR-10 experiment with tiny settings: all of its steps, each made once."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from jobs.experiments.artifacts import ArtifactCache
from jobs.experiments.matrix import run_matrix
from jobs.experiments.options import DEFAULTS, Cifar10Config
from jobs.experiments.results import read_distances
from pipeline.cli.config_files import merge, read_yaml
from pipeline.cli.options import parse_options
from pipeline.runs.metrics import read_metrics
from pipeline.storage.locks import exclusive_lock
from schemas.errors import UserError
from schemas.run import RunConfig

CPU = DEFAULTS.with_name("cifar10_cpu.yaml")
SHORT = DEFAULTS.with_name("cifar10_short.yaml")
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
        "alignment": {"projector_width": 16, "termination": {"step": 2}},
        "checkpoint": {"every": 2},
        "samples": {
            "every": 2,
            "per_class": 1,
            "batch_size": 10,
            "sampler": {"steps": 1},
            "evaluate": {"images": 10},
        },
    },
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


def config_of(source: Path, work: Path, /, **changes: Any) -> Cifar10Config:
    places = {"source": str(source), "work": str(work)}
    return Cifar10Config.model_validate(merge(merge(read_yaml(CPU), TINY), places | changes))


@pytest.fixture(scope="module")
def done(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The --work folder of two arms with one seed."""
    work = tmp_path_factory.mktemp("work")
    outcome = run_matrix(config_of(source, work, select=["vanilla", "haste"]))
    assert outcome == work / "outcome.md"
    return work


def test_arms_differ_in_the_options_that_their_names_state() -> None:
    for file in (DEFAULTS, CPU, SHORT):
        config = Cifar10Config.model_validate(read_yaml(file))
        runs = {
            arm: RunConfig.model_validate(
                merge(
                    merge(config.run, changes),
                    {"samples": {"evaluate": {"reference": "statistics.npz"}}},
                )
            )
            for arm, changes in config.arms.items()
        }
        assert {
            arm: (
                run.alignment.feature_weight,
                run.alignment.attention_weight,
                run.alignment.termination is not None,
            )
            for arm, run in runs.items()
        } == {
            "vanilla": (0, 0, False),
            "repa": (0.5, 0, False),
            "repa_terminated": (0.5, 0, True),
            "atta": (0, 0.5, False),
            "haste_always": (0.5, 0.5, False),
            "haste": (0.5, 0.5, True),
        }
        assert all(run.steps == runs["haste"].steps for run in runs.values())


def test_outcome_has_every_arm_at_every_step(done: Path) -> None:
    values = json.loads((done / "outcome.json").read_text())
    distances = values["frechet_distances"]
    assert set(distances) == set(Cifar10Config.model_validate(read_yaml(DEFAULTS)).arms)
    for arm in ("vanilla", "haste"):
        assert sorted(distances[arm]) == ["2", "4"]
        assert all(len(found) == 1 and found[0] > 0 for found in distances[arm].values())
    assert distances["repa"] == {}
    facts = values["facts"]
    assert 0 <= facts["teacher"]["knn_held_out"]["class token"] <= 1
    assert 0 <= facts["judge"]["held_out_accuracy"] <= 1
    assert facts["reference"]["held_out_fid"] > 0
    text = (done / "outcome.md").read_text()
    assert "| haste | 1 |" in text
    assert "| repa | 0 | - | - |" in text
    assert Image.open(done / "outcome.png").size[0] > 400
    assert (done / "report.html").read_text().count("haste-seed0") > 1


def test_held_out_images_are_not_in_the_store_and_all_runs_share_it(done: Path) -> None:
    assert len(list((done / "images" / "train").rglob("*.png"))) == 60
    assert len(list((done / "images" / "held_out").rglob("*.png"))) == 60
    manifest = json.loads((done / "store" / "manifest.json").read_text())
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


def test_other_evaluations_of_a_run_are_ignored(tmp_path: Path) -> None:
    own: dict[str, Any] = {"network": "judge", "samples": 10, "weights": "ema"}
    own |= {"sampling": {"sampler": {"steps": 50, "guidance": 1.0}, "labels": "random"}}
    drawn = {**own["sampling"], "precision": "float32"}
    guided = {**drawn, "sampler": {"steps": 50, "guidance": 1.5}}
    rows = [
        {"step": 2, "fid": 9.0, **own, "sampling": None},  # of an earlier version
        {"step": 4, "fid": 10.0, **own, "sampling": drawn},
        {"step": 4, "fid": 99.0, **own, "samples": 50_000},
        {"step": 4, "fid": 98.0, **own, "sampling": guided},
    ]
    (tmp_path / "haste-seed0").mkdir()
    (tmp_path / "haste-seed0" / "evaluations.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows)
    )
    assert read_distances(tmp_path, ["haste-seed0"], own) == {"haste": {2: [9.0], 4: [10.0]}}


def test_a_second_call_makes_nothing(source: Path, done: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in done.rglob("*.safetensors")}
    run_matrix(config_of(source, done, select=["vanilla", "haste"]))
    assert before == {path: path.stat().st_mtime_ns for path in done.rglob("*.safetensors")}


def test_an_artifact_of_other_options_is_refused(source: Path, done: Path) -> None:
    with pytest.raises(UserError, match=r"the teacher in '.*' was made with another steps"):
        run_matrix(config_of(source, done, teacher={**TINY["teacher"], "steps": 3}))


def test_a_store_of_other_layers_is_refused(source: Path, done: Path) -> None:
    with pytest.raises(UserError, match=r"store '.*/store' was made with"):
        run_matrix(config_of(source, done, store={**TINY["store"], "layers": [2, 3, 4, 5]}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"select": ["hast"]}, r"--select hast: the arms are vanilla, repa"),
        ({"source": None}, r"--source is missing"),
        ({"source": "/nowhere.zip"}, r"--source '/nowhere.zip' is not a readable zip"),
        ({"arms": {"haste": {"alignment": {"student_layer": [1]}}}}, r"the arm 'haste'"),
        (
            {"arms": {"haste": {"samples": {"evaluate": {"images": 20}}}}},
            r"the arm 'haste' has options samples.\* of its own",
        ),
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


def test_a_config_without_evaluations_is_refused(source: Path, tmp_path: Path) -> None:
    config = Cifar10Config.model_validate({"source": str(source), "work": str(tmp_path / "work")})
    with pytest.raises(UserError, match=r"there are no arms"):
        run_matrix(config)
    config = config.model_copy(update={"arms": {"vanilla": {}}})
    with pytest.raises(UserError, match=r"run.samples.evaluate.images is missing"):
        run_matrix(config)
    assert not (tmp_path / "work").exists()


def test_a_damaged_image_is_named(source: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.zip"
    with zipfile.ZipFile(source) as whole, zipfile.ZipFile(damaged, "w") as zipped:
        for name in whole.namelist():
            data = whole.read(name)
            zipped.writestr(name, data[:60] if name.endswith("class3/0002.png") else data)
    with pytest.raises(UserError, match=r"'.*class3/0002.png' cannot be used"):
        run_matrix(config_of(damaged, tmp_path / "work"))


def test_a_run_that_another_process_trains_is_refused(source: Path, done: Path) -> None:
    busy = done / "running" / "haste-seed0"
    with (
        exclusive_lock(busy, what="it", remedy="wait"),
        pytest.raises(UserError, match=r"the run 'haste-seed0' in --work '.*' is being written by"),
    ):
        run_matrix(config_of(source, done, select=["haste"]))


def test_one_process_at_a_time_makes_artifacts(tmp_path: Path) -> None:
    """And temporary folders of killed processes are removed."""
    cache = ArtifactCache(tmp_path / "work")
    (tmp_path / "work" / ".tmp-killed").mkdir(parents=True)

    def make(folder: Path) -> dict[str, Any]:
        with pytest.raises(UserError, match=r"--work '.*' is being written by process \d+"):
            ArtifactCache(tmp_path / "work").get("other", {}, lambda _: {})
        return {"made": folder.name}

    final, report = cache.get("thing", {"size": 1}, make)
    assert report["made"].startswith(".tmp-")
    assert sorted(path.name for path in final.parent.iterdir()) == ["thing"]


def test_command_has_its_own_defaults() -> None:
    config = parse_options(
        Cifar10Config,
        ["--config", str(DEFAULTS), "--seeds", "0,1,2"],
        command="cifar10.py",
        about="",
    )
    assert config.seeds == (0, 1, 2)
    assert len(config.arms) == 6
