"""Class streams: in the manifest, and read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from pipeline.store import BatchLoader, SampleOrder, Store, StreamReader
from pipeline.targets.class_token import ClassTokens, read_class_tokens
from schemas.errors import UserError
from schemas.store import Manifest
from schemas.streams import ClassStream
from tests.helpers import edit_json, recorded_opens
from tests.stores import WIDTH, add_class_stream, add_random_stream, make_random_store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return make_random_store(tmp_path / "store", samples=7, shard_size=3)


def other_teacher(**changes: object) -> dict[str, object]:
    return {"weights_sha256": "7" * 64, **changes}


def test_a_class_stream_is_neither_a_teacher_stream_nor_written_with_defaults(store: Store) -> None:
    before = store.manifest
    store = add_class_stream(store)
    assert store.manifest.teacher_streams == before.teacher_streams
    assert store.manifest.base_streams == before.base_streams
    assert store.added_streams == ["class"]
    assert list(store.manifest.class_streams) == ["class"]
    (text,) = [json.loads(Path(store.root, "manifest.json").read_text())["streams"]["class"]]
    assert text.keys() == {"kind", "columns", "teacher", "compute", "added"}
    assert "layers" not in text["teacher"]
    base = store.manifest.model_dump()
    base["streams"]["class"]["added"] = False
    assert "class" in Manifest.model_validate(base).base_streams


def test_tokens_are_those_that_were_written_and_alone_are_read(store: Store) -> None:
    store = add_class_stream(store)
    shards, rows = np.array([2, 0, 1]), np.array([0, 2, 1])
    with recorded_opens() as paths:
        tokens = read_class_tokens(store, shards, rows)
    assert tokens.dtype == torch.float32
    expected = np.random.default_rng(2).standard_normal((7, WIDTH)).astype(np.float16)
    np.testing.assert_array_equal(tokens.numpy(), expected[[6, 2, 4]].astype(np.float32))
    assert any("/class/" in path for path in paths)
    assert not any("/maps/" in path or "/latents/" in path for path in paths)


def test_a_run_reads_the_bytes_of_its_streams_alone(store: Store) -> None:
    """A token in float16 takes WIDTH * 2 bytes, and half as much again of headers at most."""
    store = add_class_stream(store)
    order = SampleOrder(0, store.index().samples_per_shard, 2)
    loader = BatchLoader(store, ["class"], order, global_batch=4, memory=0, prefetch=1)
    try:
        batch = next(iter(loader))
        assert ClassTokens(store.manifest)(
            {n: torch.from_numpy(a) for n, a in batch.columns["class"].items()}
        ).shape == (4, WIDTH)
        assert loader.bytes_read.keys() == {"class"}
    finally:
        loader.close()


def test_which_stream_is_meant(store: Store) -> None:
    with pytest.raises(UserError, match=r"no class stream: compute it with .* --add-stream class$"):
        store.manifest.class_stream()
    with pytest.raises(UserError, match=r"no class tokens of stream 'maps': .*-stream class$"):
        store.manifest.class_stream("maps")
    store = add_random_stream(store, "clip", **other_teacher())
    store = add_class_stream(store)
    assert ClassTokens(store.manifest).stream == "class"
    assert store.manifest.class_stream("maps")[0] == "class"
    with pytest.raises(UserError, match=r"class tokens of stream 'clip': .*-stream clip_class$"):
        store.manifest.class_stream("clip")
    clip = store.manifest.streams["clip"].model_dump()["teacher"]
    store = add_class_stream(store, "clip_class", teacher=clip, token="mean")
    assert store.manifest.class_stream("clip") == (
        "clip_class",
        store.manifest.streams["clip_class"],
    )
    assert store.manifest.class_stream("maps")[0] == "class"
    with pytest.raises(UserError, match="several class streams: choose one of class, clip_class"):
        store.manifest.class_stream()
    with pytest.raises(UserError, match="no class stream 'none', only class, clip_class"):
        store.manifest.class_stream("none")


def test_other_layers_of_one_teacher_share_their_class_tokens(store: Store) -> None:
    store = add_class_stream(add_random_stream(store, "late", layers=(0,), weights="elsewhere"))
    assert store.manifest.class_stream("late")[0] == "class"


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda s: s["columns"]["class_token"].update(shape=(WIDTH + 1,)), "teacher's width"),
        (lambda s: s["columns"].update(other=s["columns"]["class_token"]), "teacher's width"),
        (lambda s: s["teacher"].update(prefix=0), "without a class token"),
        (lambda s: s.update(token="sum"), "token"),
        (
            lambda s: s["columns"]["class_token"].update(codec="uint8"),
            "uint8, which is not a float",
        ),
    ],
)
def test_a_manifest_whose_class_stream_is_none_is_refused(
    store: Store, change: Any, complaint: str
) -> None:
    store = add_class_stream(store)
    edit_json(Path(store.root, "manifest.json"), lambda values: change(values["streams"]["class"]))
    with pytest.raises(UserError, match=complaint) as error:
        Store.open(store.url)
    assert "\n" not in str(error.value)


def test_a_mean_needs_no_class_token(store: Store) -> None:
    values = add_class_stream(store).manifest.model_dump()["streams"]["class"]
    values["teacher"]["prefix"] = 0
    assert ClassStream.model_validate({**values, "token": "mean"}).token == "mean"


def test_activations_need_a_layer_to_begin_at(store: Store) -> None:
    values = store.manifest.model_dump()
    stream = values["streams"]["maps"]
    stream["teacher"]["layers"] = ()
    del stream["columns"]["attention"]
    manifest = Manifest.model_validate(values)
    assert "layers" not in json.loads(manifest.model_dump_json())["streams"]["maps"]["teacher"]
    stream |= {"cut": "activations", "columns": {"tokens": {"shape": (17, 12), "codec": "float16"}}}
    with pytest.raises(ValidationError, match="'activations' and names no layers"):
        Manifest.model_validate(values)


def test_stored_arrays_are_read_by_name(store: Store) -> None:
    reader = StreamReader(add_class_stream(store), "class")
    assert reader.read(np.zeros(1, int), np.zeros(1, int)).keys() == {"class_token"}
