"""A later cut or fewer layers of the same teacher: the targets that an extraction of them has."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.checkpoints.store_identity import store_identity
from pipeline.inspect.summary import describe, summarise
from pipeline.targets.sources import Wanted
from pipeline.targets.tail import load_tail, tail_file
from schemas.alignment import AlignmentConfig
from tests.conversions import (
    Extract,
    arrays_of,
    assert_close,
    assert_same_arrays,
    converted,
    divergence,
    targets_of,
)


@pytest.mark.parametrize("cut", ["qk", "activations", "image"])
@pytest.mark.parametrize("codec", ["float32", "float16"])
def test_maps_of_an_earlier_cut_are_those_of_an_extraction(
    extracted: Extract, tmp_path: Path, cut: str, codec: str
) -> None:
    early = extracted(cut="image") if cut == "image" else extracted(cut=cut, codec="float32")
    made = converted(early, tmp_path / "maps", cut="maps", codec=codec)
    direct = extracted(cut="maps", codec=codec)
    name, stream = made.manifest.teacher_stream()
    was = direct.manifest.streams["maps"]
    assert (name, stream.cut, stream.tail) == ("maps", "maps", None)
    assert (stream.columns, stream.teacher) == (was.columns, was.teacher)
    assert not list(Path(made.root).glob("*.safetensors"))
    rounding = 1e-7 if codec == "float32" else 1e-3
    assert_close(targets_of(made), targets_of(direct), rtol=2e-5 + rounding, atol=1e-6)
    if cut != "qk":  # the same arithmetic in the same batches
        assert_same_arrays(made, direct, "maps")
    assert [origin.cut for origin in stream.converted_from] == [cut]
    assert "made from  " + cut in describe(made, summarise(made))


def test_lossy_activations_give_maps_within_their_promise(
    extracted: Extract, tmp_path: Path
) -> None:
    store = extracted(cut="activations", codec="faithful")
    maps = converted(store, tmp_path / "maps", cut="maps")
    codecs = {c.codec for c in maps.manifest.streams["maps"].columns.values()}
    assert codecs == {"rms26", "float16", "cbrt8"}
    assert divergence(targets_of(extracted(codec="float32")), targets_of(maps)) < 3e-4
    origin = maps.manifest.teacher_streams["maps"].converted_from[0]
    assert origin.codecs == {"tokens": "rice23"}
    assert origin.layers == (2, 3, 4, 5)


def test_queries_and_keys_of_activations(extracted: Extract, tmp_path: Path) -> None:
    store = extracted(cut="activations", codec="float32")
    qk = converted(store, tmp_path / "qk", cut="qk")
    assert_same_arrays(qk, extracted(cut="qk", codec="float32"), "qk")
    maps = converted(qk, tmp_path / "maps", cut="maps")
    assert_close(targets_of(maps), targets_of(extracted(codec="float32")), rtol=2e-5, atol=1e-6)
    cuts = [origin.cut for origin in maps.manifest.teacher_streams["maps"].converted_from]
    assert cuts == ["activations", "qk"]


@pytest.mark.parametrize("cut", ["image", "activations"])
def test_a_later_cut_carries_its_own_tail(extracted: Extract, tmp_path: Path, cut: str) -> None:
    early = extracted(cut="image") if cut == "image" else extracted(cut=cut, codec="float32")
    direct = extracted(cut="activations", codec="float32", layers=(3, 5))
    made = converted(early, tmp_path / "b", cut="activations", layers=(3, 5), codec="float32")
    assert_same_arrays(made, direct, "activations")
    file = tail_file("activations")
    assert (Path(made.root) / file).read_bytes() == (Path(direct.root) / file).read_bytes()
    stream = made.manifest.teacher_streams["activations"]
    assert stream.tail == direct.manifest.teacher_streams["activations"].tail
    assert load_tail(made, "activations", (5,)).first_block == 3
    assert torch.equal(targets_of(made).attention, targets_of(direct).attention)
    assert torch.equal(targets_of(made).features, targets_of(direct).features)


@pytest.mark.parametrize("codec", ["faithful", "float16"])
@pytest.mark.parametrize("cut", ["maps", "qk"])
def test_fewer_layers_are_a_slice(extracted: Extract, tmp_path: Path, cut: str, codec: str) -> None:
    store = extracted(cut=cut, codec=codec)
    made = converted(store, tmp_path / "b", layers=(3, 5))
    stream = made.manifest.teacher_streams[cut]
    assert (stream.teacher.layers, stream.converted_from) == ((3, 5), ())
    was, now = arrays_of(store, cut), arrays_of(made, cut)
    for part in was:
        layered = part.partition(".")[0] in {"attention", "query", "key"}
        assert np.array_equal(was[part][:, [1, 3]] if layered else was[part], now[part])
    assert torch.equal(targets_of(made).attention, targets_of(store).attention)
    assert_same_arrays(made, extracted(cut=cut, codec=codec, layers=(3, 5)), cut)


def test_other_layers_of_the_same_tokens_are_copies(extracted: Extract, tmp_path: Path) -> None:
    """A tail gives every layer behind it, and the whole teacher all."""
    tokens = converted(extracted(cut="activations"), tmp_path / "a", layers=(2, 5))
    assert_same_arrays(tokens, extracted(cut="activations"), "activations")
    assert tokens.manifest.teacher_streams["activations"].converted_from == ()
    crops = converted(extracted(cut="image"), tmp_path / "i", layers=(0, 1))
    assert_same_arrays(crops, extracted(cut="image"), "image")
    assert crops.manifest.teacher_streams["image"].teacher.layers == (0, 1)
    targets_of(crops, Wanted(features=True, layers=(1,), heads=6))


def test_tokens_move_between_layouts_without_loss(extracted: Extract, tmp_path: Path) -> None:
    """The default codec of earlier versions, the present one, and back."""
    old = extracted(cut="activations", column_codecs={"tokens": "tokens23"})
    new = converted(old, tmp_path / "new", codec="faithful", format="zarr")
    assert new.manifest.streams["activations"].columns["tokens"].codec == "rice23"
    back = converted(new, tmp_path / "back", column_codecs={"tokens": "tokens23"})
    assert_same_arrays(old, back, "activations")
    assert_close(targets_of(old), targets_of(new), rtol=0, atol=0)
    direct = extracted(cut="activations", codec="faithful")
    assert_same_arrays(direct, new, "activations")
    aligned = AlignmentConfig(stream="activations")
    assert store_identity(new, aligned) == store_identity(old, aligned)  # so that runs continue
