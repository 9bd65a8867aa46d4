"""`--check`: which runs a store can train, and the one extraction that the others need."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from pipeline.checkpoints.local import LocalCheckpoints
from pipeline.cli.config_files import merge
from pipeline.cli.options import parse_options
from pipeline.extract.compatibility import with_stores_options
from pipeline.inspect.__main__ import main
from pipeline.inspect.check import Answer, check_configs
from pipeline.runs.compatibility import check_store
from pipeline.store import ShardWriter, Store
from pipeline.teachers.vit import IMAGENET_MEAN, IMAGENET_STD
from pipeline.train.loop import train
from schemas.errors import UserError
from schemas.extract import PRESETS, ExtractConfig
from schemas.run import RunConfig
from schemas.store import Manifest
from tests.helpers import edit_json
from tests.stores import (
    COMPUTE,
    TEACHER,
    add_random_stream,
    make_random_store,
    random_manifest,
    tiny_run,
)

Capture = pytest.CaptureFixture[str]
WriteConfig = Callable[..., str]

VANILLA = {"feature_weight": 0, "attention_weight": 0, "termination": None}


@pytest.fixture
def config(tmp_path: Path) -> WriteConfig:
    """Writes a variant of the tiny run; the file's name."""

    def write(name: str = "run", **overrides: Any) -> str:
        file = tmp_path / f"{name}.yaml"
        file.write_text(yaml.safe_dump(merge(tiny_run(), overrides)))
        return str(file)

    return write


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Teacher layers 1, 2, 3 of 4."""
    return make_random_store(tmp_path / "store", samples=6, shard_size=3)


def check(store: Store, file: str) -> Answer:
    (answer,) = check_configs(Store.open(store.url), (file,))
    return answer


def extraction(command: str) -> ExtractConfig:
    """What a printed command asks for, parsed as its program does."""
    program, argv = shlex.split(command)[:3], shlex.split(command)[3:]
    assert program == ["python", "-m", "pipeline.extract"]
    return parse_options(
        ExtractConfig, argv, command="c", about="a", presets=PRESETS, preset_key="dataset"
    )


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"alignment": {"student_layers": [1], "teacher_layers": [2]}},
        {"alignment": {"feature_weight": 0.1, "attention_weight": 3.0}},
        {"alignment": {"attention_weight": 0, "teacher_layers": [0, 9]}},
        {"alignment": {"feature_weight": 0}},
        {"alignment": VANILLA},
        {"alignment": {"termination": None}},
        {"alignment": {"termination": {"kind": "gradient_cosine"}}},
        {"alignment": {"stream": "maps"}},
        {"student": {"heads": 2}},
        {"student": {"heads": 6, "width": 48}},
        {"student": {"model": "DiT-S/2"}},
        {"student": {"depth": 7}},
    ],
)
def test_what_a_store_serves_without_copying(
    store: Store, config: WriteConfig, overrides: dict[str, Any]
) -> None:
    file = config(**overrides)
    assert check(store, file) == Answer(file, True)


def test_a_yes_is_kept(store: Store, config: WriteConfig, tmp_path: Path) -> None:
    file = config(alignment={"student_layers": [1], "teacher_layers": [2]}, student={"heads": 2})
    assert check(store, file).ok
    values = {**yaml.safe_load(Path(file).read_text()), "store": store.url, "steps": 1}
    run = tmp_path / "trained"
    train(RunConfig.model_validate(values), run, LocalCheckpoints(run, keep=1).save)
    assert (run / "summary.json").exists()


def test_a_missing_layer_is_named_with_the_command_that_adds_it(
    store: Store, config: WriteConfig
) -> None:
    file = config(alignment={"teacher_layers": [0, 3]})
    answer = check(store, file)
    assert not answer.ok
    assert answer.reason == (
        "stream 'maps' lacks teacher layer 0 (it has 1, 2, 3); once it is added, train with "
        "--alignment.stream maps_0_3"
    )
    assert answer.command is not None
    asked = extraction(answer.command)
    teacher = store.manifest.teacher_stream()[1].teacher
    assert (asked.store, asked.add_stream, asked.cut) == (store.url, "maps_0_3", "maps")
    assert asked.layers == (0, 3)
    assert (asked.teacher.model, asked.teacher.image_size) == (teacher.model, 64)
    assert (asked.teacher.weights, asked.teacher.seed) == ("random", 0)
    assert (asked.codec.name, asked.compress) == ("float16", True)
    resolved = with_stores_options(asked, store)  # raises if the options contradict the store
    assert (resolved.shard_size, resolved.resolution, resolved.dataset) == (3, 64, "folder")


def test_after_the_addition_the_answer_is_yes(store: Store, config: WriteConfig) -> None:
    file = config(alignment={"teacher_layers": [0, 3]})
    store = add_random_stream(store, "maps_0_3", layers=(0, 3))
    setting = ("alignment.stream", "maps_0_3")
    expected = Answer(file, True, "with --alignment.stream maps_0_3", settings=(setting,))
    assert check(store, file) == expected
    assert (expected.options, expected.by_options) == (["--alignment.stream", "maps_0_3"], True)
    other = {"feature_depth": 2, "teacher_layers": [0, 3], "student_layers": [0, 1]}
    several = check(store, config(alignment={"stream": "maps", "others": [other]}))
    assert several.reason == "with alignment.others.0.stream maps_0_3"
    assert (several.ok, several.by_options) == (True, False)  # an option cannot set it
    named = config(alignment={"teacher_layers": [0, 3], "stream": "maps_0_3"})
    assert check(store, named) == Answer(named, True)
    values = yaml.safe_load(Path(named).read_text())
    check_store(RunConfig.model_validate(values), store.manifest)


def test_every_stream_that_does_not_fit_is_named(store: Store, config: WriteConfig) -> None:
    store = add_random_stream(store, "late", layers=(0,))
    answer = check(store, config(alignment={"teacher_layers": [0, 3]}))
    assert "stream 'maps' lacks teacher layer 0" in str(answer.reason)
    assert "stream 'late' lacks teacher layer 3 (it has 0)" in str(answer.reason)
    assert extraction(str(answer.command)).add_stream == "maps_0_3"


def test_a_stream_that_was_named_is_added_under_its_name(store: Store, config: WriteConfig) -> None:
    answer = check(store, config(alignment={"stream": "qk"}))
    assert answer.reason == "the store holds no teacher stream 'qk', only maps"
    asked = extraction(str(answer.command))
    assert (asked.add_stream, asked.layers) == ("qk", (1, 3))
    taken = check(store, config(alignment={"stream": "maps", "teacher_layers": [0, 3]}))
    assert extraction(str(taken.command)).add_stream == "maps_0_3"
    assert "train with --alignment.stream maps_0_3" in str(taken.reason)


def test_a_stream_whose_shards_are_missing_is_completed_as_it_was_begun(
    store: Store, config: WriteConfig
) -> None:
    store = add_random_stream(store, "late", layers=(0, 3))
    Path(store.root, "commits", "late", "shard-000001.json").unlink()
    answer = check(store, config(alignment={"teacher_layers": [0, 3]}))
    assert answer.reason == "stream 'late' lacks 1 shards"
    asked = extraction(str(answer.command))
    assert (asked.add_stream, asked.layers) == ("late", (0, 3))
    assert (asked.batch_size, asked.precision) == (4, "float32")
    assert check(store, config(alignment={"teacher_layers": [1, 2]})).ok


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (
            {"student": {"latent_size": 16}},
            "it does not fit this store: the store holds latents 4x8x8",
        ),
        ({"student": {"num_classes": 4}}, "it does not fit this store: the store has 5 classes"),
        ({"student": {"num_classes": 1000}}, "student.num_classes is 1000: set --student.num-cla"),
        ({"alignment": {"teacher_layers": [9, 1]}}, "the store's teacher has layers 0 to 3 only"),
        ({"stepz": 5}, "unknown key 'stepz' (did you mean 'steps'?)"),
        ({"steps": 0}, "steps: "),
    ],
)
def test_what_no_addition_mends(
    store: Store, config: WriteConfig, overrides: dict[str, Any], reason: str
) -> None:
    answer = check(store, config(**overrides))
    assert (answer.ok, answer.command) == (False, None)
    assert reason in str(answer.reason)
    assert "\n" not in str(answer)


def test_an_incomplete_store_trains_nothing(store: Store, config: WriteConfig) -> None:
    Path(store.root, "commits", "shard-000001.json").unlink()
    answer = check(store, config())
    assert answer.reason == ("1 of the store's 2 shards are missing: run its extraction again")


def test_a_store_without_teacher_gets_one(store: Store, config: WriteConfig) -> None:
    edit_json(Path(store.root, "manifest.json"), lambda v: v["streams"].pop("maps"))
    for shard in range(2):
        path = Path(store.root, "commits", f"shard-{shard:06d}.json")
        edit_json(path, lambda v: v["streams"].pop("maps"))
    assert check(store, config(alignment=VANILLA)).ok
    answer = check(store, config())
    assert answer.reason == "the store holds no teacher stream"
    asked = extraction(str(answer.command))
    assert (asked.cut, asked.layers, asked.add_stream) == (
        "activations",
        (1, 3),
        "activations_1_3",
    )


def test_codecs_and_model_arguments_are_those_of_the_store(
    store: Store, config: WriteConfig
) -> None:
    def change(values: dict[str, Any]) -> None:
        maps = values["streams"]["maps"]
        maps["columns"]["features"]["codec"] = "rms26"
        maps["columns"]["features"]["lossless"] = "zstd"
        maps["teacher"]["model_args"] = {"depth": 4, "name": "it's 5", "sizes": [1, 2], "no": None}
        maps["teacher"]["weights"] = "/a folder/w.pth"
        values["dataset"]["source"] = "/data/my images"

    edit_json(Path(store.root, "manifest.json"), change)
    answer = check(store, config(alignment={"teacher_layers": [0, 3]}))
    asked = extraction(str(answer.command))
    assert asked.teacher.model_args == {"depth": 4, "name": "it's 5", "sizes": [1, 2], "no": None}
    assert asked.teacher.weights == "/a folder/w.pth"
    assert asked.source == "/data/my images"
    assert asked.column_codecs == {
        "features": "rms26",
        "class_token": "float16",
        "attention": "float16",
    }
    assert asked.compress


def test_the_page_has_a_line_for_each_and_the_exit_code_tells(
    store: Store, config: WriteConfig, capsys: Capture
) -> None:
    good, bad = config("good"), config("bad", alignment={"teacher_layers": [0, 3]})
    assert main([store.url, "--check", good, bad, "/no/such.yaml"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"yes  {good}"
    assert lines[1].startswith(f"no   {bad}: stream 'maps' lacks teacher layer 0")
    assert "add it with: python -m pipeline.extract --store " in lines[1]
    assert lines[2].startswith("no   /no/such.yaml: cannot read this config")
    assert main([store.url, "--check", f"{good},{good}"]) == 0
    assert capsys.readouterr().out.splitlines() == [f"yes  {good}"] * 2
    assert main(["--check", good, bad, "--json", store.url]) == 1
    (line,) = capsys.readouterr().out.splitlines()
    found = json.loads(line)
    assert found.keys() == {"configs", "ok"}
    expected = {"config": good, "ok": True, "reason": None, "command": None, "settings": {}}
    assert found["configs"][0] == expected
    assert [answer["ok"] for answer in found["configs"]] == [True, False]
    assert found["ok"] is False
    assert main(["--check", good, "--json", store.url]) == 0
    assert json.loads(capsys.readouterr().out)["ok"] is True


def test_the_projects_own_configs_are_told_what_a_small_store_is_not(store: Store) -> None:
    files = tuple(str(f) for f in sorted(Path("jobs/configs").glob("sit_*.yaml")))
    assert len(files) > 10
    for answer in check_configs(store, files):
        assert "does not fit this store" in str(answer.reason)


def test_one_question_at_a_time(store: Store) -> None:
    with pytest.raises(UserError, match="--verify cannot be combined with"):
        main([store.url, "--verify", "--gc"])


def imagenet_store(folder: Path) -> Store:
    """One sample in the shapes of ImageNet at 256 px, of DINOv2-B's layers 7 to 11."""
    teacher = {
        **TEACHER,
        "model": "vit_base_patch14_dinov2.lvd142m",
        "image_size": 224,
        "depth": 12,
        "width": 768,
        "heads": 12,
        "head_width": 64,
        "grid": (16, 16),
        "layers": (7, 8, 9, 10, 11),
        "mean": IMAGENET_MEAN,
        "std": IMAGENET_STD,
    }
    values = random_manifest(1, 1).model_dump()
    values["resolution"], values["dataset"]["num_classes"] = 256, 1000
    values["autoencoder"]["latent_shape"] = latent = (4, 32, 32)
    for name in ("mean", "std"):
        values["streams"]["latents"]["columns"][name]["shape"] = latent
    maps = values["streams"]["maps"]
    maps["teacher"] = teacher
    shapes = {"features": (256, 768), "class_token": (768,), "attention": (5, 12, 256, 256)}
    for name, shape in shapes.items():
        maps["columns"][name]["shape"] = shape
    tokens = {k: v for k, v in teacher.items() if k != "layers"}
    column = {"shape": (768,), "codec": "float16"}
    values["streams"]["class"] = {
        **{"kind": "class", "columns": {"class_token": column}, "compute": COMPUTE},
        "teacher": tokens,
    }
    store = Store.create(str(folder), Manifest.model_validate(values))
    rng = np.random.default_rng(0)
    values_of = {name: rng.random(shape, np.float32) for name, shape in shapes.items()}
    with ShardWriter(store.url, store.manifest, 0) as writer:
        writer.add(
            "one",
            {
                "latents": {"mean": np.zeros(latent), "std": np.zeros(latent), "label": 1},
                "maps": values_of,
                "class": {"class_token": values_of["class_token"]},
            },
        )
        writer.commit()
    store.finish()
    return store


def test_one_store_serves_every_config_of_its_resolution(tmp_path: Path, capsys: Capture) -> None:
    store = imagenet_store(tmp_path / "store")
    main([store.url, "--check", "jobs/configs", "--json"])
    found = {Path(a["config"]).stem: a for a in json.loads(capsys.readouterr().out)["configs"]}
    assert found.keys() == {path.stem for path in Path("jobs/configs").glob("*.yaml")}
    elsewhere = {n for n in found if n.startswith(("demo", "mmdit")) or "_512_" in n}
    assert {name for name, answer in found.items() if not answer["ok"]} == elsewhere
    assert not any(answer["reason"] for answer in found.values() if answer["ok"])
    for name in elsewhere:
        reads_captions = name.startswith("mmdit")
        reason = "the data set has none" if reads_captions else "does not fit this store"
        assert reason in found[name]["reason"]
    assert {"sit_b2_reg", "sit_xl2_reg_haste"} <= found.keys()


def test_check_alone_is_a_table_of_all_shipped_configs(tmp_path: Path, capsys: Capture) -> None:
    store = imagenet_store(tmp_path / "store")
    assert main([store.url, "--check"]) == 1
    header, *lines = capsys.readouterr().out.splitlines()
    names = {path.stem for path in Path("jobs/configs").glob("*.yaml")}
    assert header.split() == ["config", "classes"]
    rows = {line.split()[1]: line.split() for line in lines[: len(names)]}
    assert rows.keys() == names
    assert rows["sit_b2_haste"][0] == "yes"
    assert rows["sit_b2_haste"][2:] == ["the", "store's"]
    assert rows["demo"][:3] == ["no", "demo", "10"]
    count = store.manifest.dataset.num_classes
    assert lines[len(names)].endswith(f"can be trained on this store of {count} classes")
    main(["--check", "--json", store.url])
    assert len(json.loads(capsys.readouterr().out)["configs"]) == len(names)


def test_missing_class_tokens_are_named_with_the_command_that_computes_them(tmp_path: Path) -> None:
    store = imagenet_store(tmp_path / "store")
    for path in (Path(store.root, "manifest.json"), *Path(store.root, "commits").iterdir()):
        edit_json(path, lambda values: values["streams"].pop("class"))
    Path(store.root, "index.json").unlink()
    answer = check(store, "jobs/configs/sit_b2_reg.yaml")
    assert (answer.ok, answer.reason) == (False, "the store holds no class tokens of the teacher")
    asked = extraction(str(answer.command))
    assert asked.model_fields_set == {"store", "add_stream"}
    assert (asked.store, asked.add_stream) == (store.url, "class")
    assert check(store, "jobs/configs/sit_b2_haste.yaml").ok
    edit_json(Path(store.root, "manifest.json"), without_prefix)
    refused = check(store, "jobs/configs/sit_b2_reg.yaml")
    assert (refused.ok, refused.command) == (False, None)


def without_prefix(values: dict[str, Any]) -> None:
    """A teacher that is not as the manifest says gives nothing."""
    values["streams"]["maps"]["teacher"]["prefix"] = 0


def test_a_folder_without_configs_is_refused(store: Store, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"--check .*empty: the folder holds no .yaml file"):
        main([store.url, "--check", str(tmp_path / "empty")])
