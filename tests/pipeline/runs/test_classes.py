"""Classes of a run: their number comes from the store, labels from classes that were trained on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import pipeline.runs.compatibility as compatibility
from jobs.sample import main as sample
from pipeline.checkpoints.export import export_checkpoint
from pipeline.checkpoints.local import LocalCheckpoints
from pipeline.checkpoints.state import read_state
from pipeline.checkpoints.student import load_trained_student
from pipeline.cli.config_files import merge
from pipeline.cli.options import parse_options
from pipeline.distributed.process_group import ProcessGroup
from pipeline.inspect.check import check_configs
from pipeline.runs.compatibility import grid_classes, resolve_run
from pipeline.sampling.batches import choose_classes
from pipeline.sampling.worker import SampleWorker
from pipeline.store import Store
from pipeline.train.loop import train
from pipeline.train.validation.sampling import DistributedSampler
from schemas.errors import UserError
from schemas.run import RunConfig, SamplesConfig
from schemas.sample import SampleConfig
from tests.helpers import edit_json
from tests.stores import make_random_store, tiny_run

NAMES = ["ant", "bee", "cow", "dog", "emu"]
VANILLA = {"feature_weight": 0, "attention_weight": 0, "termination": None}
MakeConfig = Callable[..., RunConfig]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Five classes with names; class 3 has no images."""
    made = make_random_store(tmp_path / "store", samples=6, shard_size=3)
    change = {"class_names": NAMES, "empty_classes": [3]}
    edit_json(Path(made.root, "manifest.json"), lambda m: m["dataset"].update(change))
    return Store.open(made.url)


@pytest.fixture
def config(store: Store) -> MakeConfig:
    """One step of the tiny run without a teacher; its student does not state ``num_classes``."""

    def make(**overrides: Any) -> RunConfig:
        values: dict[str, Any] = {"store": store.url, "steps": 1, "alignment": VANILLA}
        values = merge(merge(tiny_run(), values), overrides)
        if "num_classes" not in overrides.get("student", {}):
            del values["student"]["num_classes"]
        return RunConfig.model_validate(values)

    return make


def run(config: RunConfig, folder: Path, resume: Path | None = None) -> Path:
    train(config, folder, LocalCheckpoints(folder, keep=3).save, resume=resume)
    return folder / f"checkpoint-{config.steps:09d}"


def test_the_number_of_classes_is_the_stores(config: MakeConfig, tmp_path: Path) -> None:
    checkpoint = run(config(), tmp_path / "run")
    assert read_state(checkpoint).config.student.num_classes == 5
    written = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert written["student"]["num_classes"] == 5
    loaded = load_trained_student(checkpoint)
    assert loaded.student.state_dict()["y_embedder.embedding_table.weight"].shape[0] == 6
    run(config(steps=2), tmp_path / "run", resume=checkpoint)


@pytest.mark.parametrize("count", [1, 4, 6, 1000])
def test_another_number_is_refused_everywhere(
    config: MakeConfig, store: Store, tmp_path: Path, count: int
) -> None:
    stated = config(student={"num_classes": count})
    message = (
        f"the store has 5 classes, student.num_classes is {count}: set --student.num-classes 5"
    )
    with pytest.raises(UserError, match=message):
        resolve_run(stated, store.manifest, None, None)
    file = tmp_path / "stated.yaml"
    file.write_text(yaml.safe_dump(merge(tiny_run(), {"student": {"num_classes": count}})))
    (answer,) = check_configs(store, (str(file),))
    assert not answer.ok
    assert message in str(answer.reason)
    with pytest.raises(UserError, match=message):
        run(stated, tmp_path / "run")


def test_a_config_of_the_project_gets_the_number_of_a_part_of_imagenet(store: Store) -> None:
    """No published config states the number of classes."""
    for file in sorted(Path("jobs/configs").glob("*_xl2_*.yaml")):
        made = parse_options(RunConfig, ["--config", str(file)], command="c", about="a")
        resolved = compatibility.with_classes(made, store.manifest)
        assert resolved.student.num_classes == 5


def test_a_run_that_began_with_more_classes_goes_on(
    config: MakeConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Earlier versions let a student of 1,000 classes train on five."""
    with monkeypatch.context() as patch:
        patch.setattr(compatibility, "check_classes", lambda *_: None)
        begun = run(config(student={"num_classes": 1000}), tmp_path / "run")
    after = run(config(steps=2), tmp_path / "run", resume=begun)
    assert "the run began with student.num_classes 1000" in caplog.text
    state = read_state(after)
    assert state.config.student.num_classes == 1000
    assert choose_classes(None, state.classes) == (0, 1, 2, 4)
    with pytest.raises(UserError, match="class 7; the model has classes 0 to 4"):
        choose_classes((7,), state.classes)


def test_a_checkpoint_of_an_earlier_version_has_all_classes_of_its_student() -> None:
    folder = Path("tests/fixtures/store_and_run_0/run/checkpoint-000000010")
    assert read_state(folder).classes.model_dump() == {"count": 10, "names": (), "empty": ()}
    with pytest.raises(UserError, match="no class names are known here"):
        choose_classes(("three",), read_state(folder).classes)


def test_sampling_and_validation_draw_from_the_same_classes(
    config: MakeConfig, store: Store, tmp_path: Path
) -> None:
    checkpoint = run(config(), tmp_path / "run")
    sampling = {"checkpoint": str(checkpoint), "num": 4, "npz": "x.npz", "autoencoder": "demo"}
    worker = SampleWorker().load(SampleConfig.model_validate(sampling), str(checkpoint), "cpu", 1)
    drawn = choose_classes(None, worker.classes)
    assert drawn == (0, 1, 2, 4)
    validation = config(samples={"every": 1, "autoencoder": "demo"})
    sampler = DistributedSampler(validation, store.manifest, ProcessGroup())
    assert sampler.classes.trained == drawn
    assert grid_classes(validation, sampler.classes) == drawn
    named = config(samples={"every": 1, "classes": "emu,0-1"})
    assert grid_classes(named, sampler.classes) == (4, 0, 1)


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ("dog", r"--samples.classes asks for class 3 \(dog\), which has no images"),
        ([3], "which has no images"),
        ("cat", "--samples.classes: there is no class 'cat'"),
        ("9", "--samples.classes asks for class 9; the model has classes 0 to 4"),
    ],
)
def test_classes_of_the_grid_are_checked_before_training(
    config: MakeConfig, store: Store, classes: object, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        resolve_run(config(samples={"every": 1, "classes": classes}), store.manifest, None, None)


def test_names_work_without_the_store(
    config: MakeConfig, store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From a run, and from a file that is exported from it; numbers and names draw the same."""
    checkpoint = run(
        config(student={"depth": None, "width": None, "heads": None}), tmp_path / "run"
    )
    export_checkpoint(checkpoint, tmp_path / "exported.pt")
    Path(store.root, "manifest.json").unlink()
    options = ["--per-class", "1", "--sampler.method", "ode", "--sampler.steps", "1"]
    options += ["--autoencoder", "demo", "--device", "cpu"]

    def grid(place: Path, classes: str, *more: str) -> bytes:
        png = tmp_path / "grid.png"
        argv = ["--checkpoint", str(place), "--classes", classes, "--png", str(png), *more]
        assert sample([*argv, *options]) == 0
        return png.read_bytes()

    numbers = grid(tmp_path / "run", "4,1")
    assert grid(tmp_path / "run", "emu,bee") == numbers != grid(tmp_path / "run", "bee,emu")
    file, model = tmp_path / "exported.pt", ("--model", "SiT-S/2")
    assert grid(file, "emu,bee", *model) == numbers
    with pytest.raises(UserError, match=r"class 3 \(dog\), which has no images"):
        grid(file, "dog", *model)
    with pytest.raises(UserError, match="no class 'cat'"):
        grid(tmp_path / "run", "cat")


def test_foreign_files_take_numbers_only(config: MakeConfig, tmp_path: Path) -> None:
    import torch

    checkpoint = run(
        config(student={"depth": None, "width": None, "heads": None}), tmp_path / "run"
    )
    export_checkpoint(checkpoint, tmp_path / "file.pt")
    content = torch.load(tmp_path / "file.pt", weights_only=True)
    for args, message in (
        ({}, None),
        ({"classes": ["cat"]}, None),
        ({"classes": {"0": "cat"}}, None),
        ({"classes": {"count": 99}}, "99 classes, its student has 5"),
        ({"classes": {"count": 2, "names": ["a"]}}, "there are 1 names of 2 classes"),
    ):
        torch.save({**content, "args": {"path_type": "linear", **args}}, tmp_path / "file.pt")
        if message is None:
            classes = load_trained_student(tmp_path / "file.pt", model="SiT-S/2").classes
            assert choose_classes(None, classes) == (0, 1, 2, 3, 4)
            with pytest.raises(UserError, match="give class numbers"):
                choose_classes(("cat",), classes)
        else:
            with pytest.raises(UserError, match=message):
                load_trained_student(tmp_path / "file.pt", model="SiT-S/2")


def test_options_take_words_as_they_are() -> None:
    def classes(*argv: str) -> object:
        return parse_options(SampleConfig, ["--classes", *argv], command="c", about="a").classes

    assert classes("n01440764,no,7,0-2,nan") == ("n01440764", "no", 7, 0, 1, 2, "nan")
    assert classes('["fox, red", 3]') == ("fox, red", 3)
    assert classes("018") == (18,)
    assert classes("none") is None
    for text in ("1:30", "1,1", "-1", "1.0"):
        with pytest.raises(UserError, match="options: classes"):
            classes(text)
    dumped = SamplesConfig.model_validate({"classes": "name:7,7"}).model_dump(mode="json")
    assert SamplesConfig.model_validate(dumped).classes == ("name:7", 7)


def test_checkpoints_without_more_than_a_number_have_no_new_key(tmp_path: Path) -> None:
    plain = make_random_store(tmp_path / "plain", samples=6, shard_size=3)
    values = merge(tiny_run(), {"store": plain.url, "steps": 1, "alignment": VANILLA})
    checkpoint = run(RunConfig.model_validate(values), tmp_path / "run")
    assert "classes" not in json.loads((checkpoint / "state.json").read_text())
