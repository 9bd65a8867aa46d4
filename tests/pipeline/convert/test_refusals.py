"""Conversions that the source does not allow are refused in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.store import ShardWriter, Store
from pipeline.store.codecs import coarser_than
from tests.conversions import Extract, converted, refusal
from tests.helpers import all_files, write_known_store


@pytest.mark.parametrize(
    ("source", "cut"),
    [
        ("maps", "qk"),
        ("maps", "activations"),
        ("maps", "image"),
        ("qk", "activations"),
        ("qk", "image"),
        ("activations", "image"),
    ],
)
def test_an_earlier_cut_is_refused(
    extracted: Extract, tmp_path: Path, source: str, cut: str
) -> None:
    store = extracted() if source == "maps" else extracted(cut=source)
    message = refusal(store, tmp_path / "b", cut=cut)
    assert message.startswith(f"--cut {cut}: stream '{source}' of ")
    assert f"keeps the cut '{source}'" in message
    assert (
        f"python -m pipeline.extract --store {store.url} --add-stream NAME --cut {cut}" in message
    )
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("source", "layers", "lacking", "held"),
    [
        ("maps", (1, 3), "1", "2,3,4,5"),
        ("qk", (5, 6, 7), "6,7", "2,3,4,5"),
        ("activations", (1, 3), "1", "2,3,4,5"),
        ("image", (5, 6), "6", "0,1,2,3,4,5"),
    ],
)
def test_layers_that_cannot_be_had_are_named(
    extracted: Extract, tmp_path: Path, source: str, layers: Any, lacking: str, held: str
) -> None:
    store = extracted() if source == "maps" else extracted(cut=source)
    message = refusal(store, tmp_path / "b", layers=layers)
    asked = ",".join(map(str, layers))
    assert message.startswith(f"--layers {asked}: stream '{source}' of ")
    assert f"cannot give layer {lacking}, only {held}" in message


def test_finer_codecs_are_refused(extracted: Extract, tmp_path: Path) -> None:
    for was, now in [
        ("int8", "float32"),
        ("faithful", "float16"),
        ("small", "int8"),
        ("small", "faithful"),
    ]:
        message = refusal(extracted(codec=was), tmp_path / "b", codec=now)
        assert message.startswith(f"--codec {now}: stream 'maps' of ")
        assert "no more faithful" in message
    message = refusal(extracted(), tmp_path / "b", column_codecs={"attention": "float32"})
    assert message.startswith("--column-codecs.attention float32: stream 'maps' of ")
    message = refusal(extracted(), tmp_path / "b", column_codecs={"query": "int8"})
    assert "has no tensor of this name, only features" in message


def test_mixed_codecs_do_not_say_how_to_store_another_cut(
    extracted: Extract, tmp_path: Path
) -> None:
    mixed = converted(
        extracted(cut="qk", codec="float32"), tmp_path / "a", column_codecs={"key": "int8"}
    )
    message = refusal(mixed, tmp_path / "b", cut="maps")
    assert message.startswith("--codec is missing: ")
    assert message.endswith("how to store attention")
    maps = converted(mixed, tmp_path / "b", cut="maps", column_codecs={"attention": "float16"})
    codecs = {n: c.codec for n, c in maps.manifest.streams["maps"].columns.items()}
    assert codecs == {"features": "float32", "class_token": "float32", "attention": "float16"}


def test_another_conversion_is_refused(extracted: Extract, tmp_path: Path) -> None:
    store = extracted(codec="float32")
    converted(store, tmp_path / "b", codec="float16")
    before = all_files(tmp_path / "b")
    for source, given in [
        (store, {"codec": "bfloat16"}),
        (store, {"codec": "float16", "format": "zarr"}),
        (store, {"codec": "float16", "layers": (3, 5)}),
        (extracted(codec="float16"), {}),  # the same numbers, by another way
        (extracted(codec="float32", order_seed=1), {"codec": "float16"}),
        (extracted(cut="qk"), {}),
    ]:
        message = refusal(source, tmp_path / "b", **given)
        assert f"store '{tmp_path / 'b'}' was made with " in message
        assert message.endswith("name another target, or the same source and options")
    assert all_files(tmp_path / "b") == before


def test_places(extracted: Extract, tmp_path: Path) -> None:
    store = write_known_store(str(tmp_path / "a"))
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "a")
    for place in (tmp_path / "a", link, f"file://{tmp_path}/a"):
        assert "is the store to convert" in refusal(store, place, format="zarr")  # type: ignore[arg-type]
    assert "lies inside the other store" in refusal(store, tmp_path / "a" / "b")
    assert "holds the store to convert" in refusal(store, tmp_path)
    (tmp_path / "a" / "commits" / "shard-000001.json").unlink()
    assert "is not complete: 1 of 4 shards" in refusal(store, tmp_path / "b", format="zarr")
    assert not (tmp_path / "b").exists()


def test_a_manifest_that_lies_is_refused(tmp_path: Path) -> None:
    store = write_known_store(str(tmp_path / "a"))
    maps = store.manifest.teacher_streams["maps"]
    columns = {name: maps.columns[name] for name in ("features", "class_token")}
    streams = {
        **store.manifest.streams,
        "maps": maps.model_copy(update={"columns": columns}),
    }
    liar = store.update(lambda manifest: manifest.model_copy(update={"streams": streams}))
    assert "does not hold what its cut 'maps' keeps" in refusal(liar, tmp_path / "b")


def test_float16_arithmetic_needs_a_gpu(extracted: Extract, tmp_path: Path) -> None:
    store = extracted(cut="activations")
    stream = store.manifest.teacher_streams["activations"]
    half = stream.compute.model_copy(update={"precision": "float16"})
    streams = {
        **store.manifest.streams,
        "activations": stream.model_copy(update={"compute": half}),
    }
    manifest = store.manifest.model_copy(update={"streams": streams, "num_shards": 3})
    fake = Store.create(str(tmp_path / "a"), manifest)
    for shard in range(3):
        with ShardWriter(fake.url, manifest, shard) as writer:
            writer.commit()
    assert "needs a GPU" in refusal(fake, tmp_path / "b", cut="maps")


@pytest.mark.parametrize(
    ("now", "was", "finer"),
    [
        ("float32", "float16", False),
        ("float16", "bfloat16", False),
        ("float32", "int8_centred", True),
        ("bfloat16", "cbrt8", True),
        ("rms26", "rms26", False),
        ("rms27", "rms26", True),
        ("rms8", "rms26", False),
        ("int8", "int8_centred", False),
        ("int8", "tokens20", False),
        ("int8", "tokens8", True),
        ("heads64", "int8", True),
        ("heads24", "int8", False),
        ("tokens20", "rms8", False),
        ("sqrt220", "cbrt8", False),
        ("cbrt8", "sqrt220", True),
        ("int8", "sqrt220", False),
        ("tokens200", "float32", False),
    ],
)
def test_order_of_codecs(now: str, was: str, finer: bool) -> None:
    assert coarser_than(was, now) is finer
