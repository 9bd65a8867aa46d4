"""Options of an added stream: from the store and from the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.cli.options import parse_options
from pipeline.extract.compatibility import with_stores_options
from pipeline.store import Store
from schemas.errors import UserError
from schemas.extract import PRESETS, ExtractConfig, TeacherConfig
from tests.helpers import edit_json
from tests.stores import HEADS, WIDTH, add_random_stream, make_random_store

ARGUMENTS = {"patch_size": 16, "embed_dim": WIDTH, "depth": 4, "num_heads": HEADS}
OWN = TeacherConfig(
    model="vit_small_patch14_dinov2.lvd142m",
    weights="demo",
    image_size=64,
    model_args=ARGUMENTS,
)
"""The store's teacher, which is not the demo's."""


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Digits, with another shard size than the demo's preset."""
    store = make_random_store(tmp_path / "store", samples=6, shard_size=3)

    def change(values: dict[str, Any]) -> None:
        values["dataset"]["name"] = "demo"
        teacher = values["streams"]["maps"]["teacher"]
        teacher.update(OWN.model_dump(exclude_none=True))

    edit_json(Path(store.root, "manifest.json"), change)
    return Store.open(store.url)


def options_of(store: Store, *argv: str) -> ExtractConfig:
    """Options of `python -m pipeline.extract --add-stream second` with ``argv``."""
    config = parse_options(
        ExtractConfig,
        ["--store", store.url, "--add-stream", "second", *argv],
        command="c",
        about="a",
        presets=PRESETS,
        preset_key="dataset",
    )
    return with_stores_options(config, store)


@pytest.mark.parametrize("argv", [(), ("--dataset", "demo")])
def test_options_that_are_not_given_come_from_the_store(
    store: Store, argv: tuple[str, ...]
) -> None:
    config = options_of(store, *argv)
    assert (config.dataset, config.resolution, config.shard_size) == ("demo", 64, 3)
    assert (config.teacher, config.cut) == (OWN, "maps")
    assert config.layers == store.manifest.teacher_stream()[1].teacher.layers


def test_an_imagenet_store_has_imagenets_cut_and_its_own_teacher(store: Store) -> None:
    edit_json(Path(store.root, "manifest.json"), lambda v: v["dataset"].update(name="imagenet"))
    config = options_of(Store.open(store.url))
    assert (config.dataset, config.cut, config.teacher) == ("imagenet", "activations", OWN)


def test_single_options_change_the_stores_teacher(store: Store) -> None:
    config = options_of(
        store, "--teacher.weights", "random", "--teacher.seed", "5", "--layers", "0"
    )
    assert config.teacher == OWN.model_copy(update={"weights": "random", "seed": 5})
    assert config.layers == (0,)


def test_input_of_the_stores_teacher_is_taken_over(store: Store) -> None:
    def change(values: dict[str, Any]) -> None:
        chosen = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6), "statistics_of": "options"}
        values["streams"]["maps"]["teacher"].update(chosen, resize="bilinear")

    edit_json(Path(store.root, "manifest.json"), change)
    teacher = options_of(Store.open(store.url)).teacher
    assert (teacher.mean, teacher.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert teacher.resize == "bilinear"


def test_another_model_takes_no_option_of_the_stores_teacher(store: Store) -> None:
    model = "vit_base_patch16_clip_quickgelu_224.openai"
    assert options_of(store, "--teacher.model", model).teacher == TeacherConfig(model=model)


def test_an_incomplete_stream_is_completed_with_its_own_teacher(store: Store) -> None:
    store = add_random_stream(store, "second", layers=(0, 3))

    def change(values: dict[str, Any]) -> None:
        values["streams"]["second"]["teacher"]["seed"] = 9

    edit_json(Path(store.root, "manifest.json"), change)
    config = options_of(Store.open(store.url))
    assert (config.teacher.seed, config.layers) == (9, (0, 3))


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        (("--shard-size", "128"), "was made with shard_size 3, not 128"),
        (("--dataset", "imagenet"), "was made with dataset demo, not imagenet"),
        (("--resolution", "32"), "was made with resolution 64, not 32"),
    ],
)
def test_given_options_must_agree_with_the_store(
    store: Store, argv: tuple[str, ...], complaint: str
) -> None:
    with pytest.raises(UserError, match=complaint):
        options_of(store, *argv)


def test_a_store_of_an_unknown_data_set_is_one_line(store: Store) -> None:
    edit_json(Path(store.root, "manifest.json"), lambda v: v["dataset"].update(name="x"))
    with pytest.raises(UserError, match=r"dataset.*: Input should be"):
        options_of(Store.open(store.url))
