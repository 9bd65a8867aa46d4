"""`--check` of configs whose students read captions."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from pipeline.inspect.check import Answer, check_configs
from pipeline.runs.compatibility import resolve_run
from pipeline.store import Store
from pipeline.store.layout import commit_path
from schemas.run import RunConfig
from tests.helpers import edit_json
from tests.stores import add_text_stream, make_random_store


def answer(store: Store, tmp_path: Path, options: str = "", model: str = "MMDiT-9") -> Answer:
    file = tmp_path / "run.yaml"
    file.write_text(
        f"student: {{model: {model}, latent_size: 8}}\n"
        "alignment: {teacher_layers: [1, 2, 3, 1]}\n" + options
    )
    return check_configs(store, (str(file),))[0]


def changed(store: Store, **dataset: Any) -> Store:
    """The store with these facts of its data set."""
    edit_json(Path(store.root, "manifest.json"), lambda m: m["dataset"].update(dataset))
    return Store.open(store.url)


def test_captions_are_found(tmp_path: Path) -> None:
    store = add_text_stream(make_random_store(tmp_path / "s"))
    assert answer(store, tmp_path) == Answer(str(tmp_path / "run.yaml"), True)
    store = add_text_stream(store, "text_b")
    assert answer(store, tmp_path).reason == "with --diffusion.text-stream text"
    named = answer(store, tmp_path, "diffusion: {text_stream: text_b}")
    assert (named.ok, named.reason) == (True, None)
    other = answer(store, tmp_path, "diffusion: {text_stream: text_c}")
    assert not other.ok
    assert "no stream of captions 'text_c', only text, text_b" in str(other.reason)
    Path(store.root, commit_path(1, "text_b")).unlink()
    lost = answer(Store.open(store.url), tmp_path, "diffusion: {text_stream: text_b}")
    assert lost.reason == "text stream 'text_b' lacks 1 shards"
    assert str(lost.command).endswith("--add-stream text_b")


def test_missing_captions_are_told(tmp_path: Path) -> None:
    store = make_random_store(tmp_path / "s")
    none = answer(store, tmp_path)
    assert not none.ok
    assert none.reason == "MMDiT-9/2 reads captions: the data set has none"
    assert none.command is None
    addable = answer(changed(store, captions={"captions": 30}), tmp_path)
    assert addable.reason == "MMDiT-9/2 reads captions: the store holds none"
    assert str(addable.command).endswith("--add-stream text")


def test_a_student_of_classes_is_told_that_it_ignores_captions(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = add_text_stream(make_random_store(tmp_path / "s"))
    store = changed(store, dummy_class=True)
    found = answer(store, tmp_path, model="SiT-B/2")
    assert found.ok
    assert "SiT-B/2 does not read captions" in str(found.reason)
    values = {"student": {"model": "SiT-B/2", "latent_size": 8}, "store": store.url}
    values["alignment"] = {"teacher_layers": [1, 2, 3, 1]}
    with caplog.at_level(logging.WARNING):
        resolve_run(RunConfig.model_validate(values), store.manifest, None, None)
    assert "learns to draw without a condition" in caplog.text
