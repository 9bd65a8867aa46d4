"""A store in another format or codec: the same numbers where that is possible."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.store import Store
from tests.conversions import (
    Extract,
    arrays_of,
    assert_same_arrays,
    converted,
    divergence,
    run,
    targets_of,
)
from tests.helpers import all_files


@pytest.mark.parametrize(
    "given",
    [
        {"codec": "faithful"},
        {"cut": "qk", "codec": "int8"},
        {"cut": "activations", "codec": "bfloat16"},
        {"cut": "image", "compress": False},
    ],
)
def test_another_format_and_back_is_byte_identical(
    extracted: Extract, tmp_path: Path, given: dict[str, Any]
) -> None:
    tars = extracted(**given)
    arrays = converted(tars, tmp_path / "zarr", format="zarr")
    name = tars.manifest.teacher_stream()[0]
    assert arrays.manifest.format == "zarr"
    assert arrays.manifest.streams["latents"].columns == tars.manifest.streams["latents"].columns
    for stream in ("latents", name):
        assert_same_arrays(tars, arrays, stream)
    back = converted(arrays, tmp_path / "tars", format="webdataset")
    assert all_files(Path(back.root)) == all_files(Path(tars.root))


def test_a_converted_zarr_is_the_one_that_extraction_makes(
    extracted: Extract, tmp_path: Path
) -> None:
    """But for its tars' history, also in what the manifest says."""
    tars, arrays = extracted(cut="qk"), extracted(cut="qk", format="zarr")
    made = converted(tars, tmp_path / "zarr", format="zarr")
    assert all_files(Path(made.root)) == all_files(Path(arrays.root))
    assert made.manifest.teacher_streams["qk"].converted_from == ()


def test_uncompressed_and_compressed_again(extracted: Extract, tmp_path: Path) -> None:
    store = extracted(cut="qk", codec="int8")
    plain = run(store, tmp_path / "plain", compress=False)
    assert plain.bytes_after > plain.bytes_before
    assert {c.lossless for c in plain.store.manifest.streams["qk"].columns.values()} == {"none"}
    zarr = converted(plain.store, tmp_path / "zarr", format="zarr")  # keeps what it has
    assert {c.lossless for c in zarr.manifest.streams["qk"].columns.values()} == {"none"}
    packed = converted(plain.store, tmp_path / "packed", compress=True)
    assert all_files(Path(packed.root)) == all_files(Path(store.root))


@pytest.mark.parametrize("cut", ["maps", "qk", "activations"])
def test_another_codec_is_what_extraction_would_have_stored(
    extracted: Extract, tmp_path: Path, cut: str
) -> None:
    """From float32 not a bit differs; the second rounding of others stays within their promise."""
    exact = extracted(cut=cut, codec="float32")
    for codec in ("float16", "bfloat16", "int8", "faithful", "small"):
        made = converted(exact, tmp_path / codec, codec=codec)
        direct = extracted(cut=cut, codec=codec)
        assert made.manifest.streams[cut].columns == direct.manifest.streams[cut].columns
        assert_same_arrays(made, direct, cut)
        assert_same_arrays(made, exact, "latents")
    faithful = Store.open(str(tmp_path / "faithful"))
    small = run(faithful, tmp_path / "small-of-faithful", codec="small")
    assert small.bytes_after < small.bytes_before
    coarse, best = targets_of(small.store), targets_of(exact)
    assert divergence(best, coarse) < 1e-3
    assert torch.cosine_similarity(best.features, coarse.features, dim=-1).min() > 0.998


def test_float16_widens_to_float32_without_a_change(extracted: Extract, tmp_path: Path) -> None:
    for codec in ("float16", "bfloat16"):
        half = extracted(codec=codec)
        wide = converted(half, tmp_path / codec, codec="float32")
        assert torch.equal(targets_of(half).features, targets_of(wide).features)
        assert torch.equal(targets_of(half).attention, targets_of(wide).attention)


def test_one_column_in_another_codec_leaves_the_others_alone(
    extracted: Extract, tmp_path: Path
) -> None:
    store = extracted(codec="faithful")
    made = converted(store, tmp_path / "b", column_codecs={"features": "rms12"})
    columns = made.manifest.streams["maps"].columns
    assert {name: column.codec for name, column in columns.items()} == {
        "features": "rms12",
        "class_token": "float16",
        "attention": "cbrt8",
    }
    was, now = arrays_of(store, "maps"), arrays_of(made, "maps")
    assert np.array_equal(was["attention"], now["attention"])
    assert np.array_equal(was["class_token"], now["class_token"])
