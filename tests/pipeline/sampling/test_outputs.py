"""Batches on disk, and the files made from them."""

from __future__ import annotations

import json
import os
import tracemalloc
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.precision import choose_arithmetic
from pipeline.sampling.batches import ImageBatch, plan_batches
from pipeline.sampling.outputs import FolderOutput, NpzOutput, Output
from pipeline.sampling.worker import SampledBatch, _png
from pipeline.storage.npz import npy_header, write_npz
from schemas.diffusion import SamplerConfig
from schemas.errors import UserError
from schemas.sample import SampleAbout
from tests.pipeline.evaluate.sets import about_samples

BATCHES = plan_batches(5, 2)
LABELS = [3, 1, 4, 1, 5]


def about(**overrides: Any) -> SampleAbout:
    values = {"checkpoint": "/runs/a", "step": 6, "weights": "ema", "image_size": 4, "num": 5}
    values |= {"batch_size": 2, "sampler": SamplerConfig()}
    return about_samples(**{**values, **overrides})


def images(batch: ImageBatch) -> np.ndarray[Any, Any]:
    rng = np.random.default_rng(batch.number)
    return rng.integers(0, 256, (batch.count, 4, 4, 3), np.uint8)


def write(output: Output, batches: Sequence[ImageBatch]) -> None:
    for batch in batches:
        output.write(SampledBatch(batch, images(batch), tuple(map(_png, images(batch)))))


def test_an_npz_is_made_of_its_parts(tmp_path: Path) -> None:
    out = tmp_path / "a.npz"
    first = NpzOutput(str(out))
    first.open(about())
    write(first, BATCHES[:1] + BATCHES[2:])
    assert not out.exists()
    (tmp_path / "a.npz.parts" / ".tmp-whole").write_bytes(b"left by a killed process")
    os.truncate(tmp_path / "a.npz.parts" / "000000004.npy", 100)

    again = NpzOutput(str(out))
    again.open(about(checkpoint="/moved/a", version="1"))
    assert again.missing(BATCHES) == BATCHES[1:]
    write(again, BATCHES[1:])
    assert again.missing(BATCHES) == []
    again.finish(BATCHES, LABELS)
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]
    with np.load(out) as file:
        assert sorted(file) == ["about", "arr_0", "labels"]
        np.testing.assert_array_equal(file["arr_0"], np.concatenate([*map(images, BATCHES)]))
        assert (file["labels"].dtype, file["labels"].tolist()) == (np.int64, LABELS)
        assert file["about"].shape == ()
        assert json.loads(str(file["about"]))["step"] == 6
    complete = NpzOutput(str(out))
    complete.open(about())
    assert complete.missing(BATCHES) == []


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"sampler": SamplerConfig(steps=9)}, r"sampler.steps 250 \(now 9\); .*a\.npz\.parts'$"),
        (
            {"sampler": SamplerConfig(class_guidance=1.5)},
            r"other images: sampler.class_guidance none \(now 1.5\);",
        ),
        ({"labels": "balanced", "num": 6}, r"num 5 \(now 6\), labels random \(now balanced\);"),
        ({"weights_sha256": "c" * 64, "step": 9}, r"step 6 \(now 9\).*--checkpoint /runs/a;"),
    ],
)
def test_parts_of_other_images_are_refused(
    tmp_path: Path, change: dict[str, Any], complaint: str
) -> None:
    output = NpzOutput(str(tmp_path / "a.npz"))
    output.open(about())
    with pytest.raises(UserError, match=complaint):
        NpzOutput(str(tmp_path / "a.npz")).open(about(**change))
    write(output, BATCHES)
    output.finish(BATCHES, LABELS)
    with pytest.raises(UserError, match=r"a.npz' has other images: .*; name another --npz"):
        NpzOutput(str(tmp_path / "a.npz")).open(about(**change))


def test_images_with_a_guided_class_token_are_refused_for_others(tmp_path: Path) -> None:
    NpzOutput(str(tmp_path / "a.npz")).open(about(sampler=SamplerConfig(class_guidance=0.0)))
    told = json.loads((tmp_path / "a.npz.parts" / "about.json").read_text())
    assert told["sampler"]["class_guidance"] == 0
    with pytest.raises(UserError, match=r"sampler.class_guidance 0.0 \(now none\);"):
        NpzOutput(str(tmp_path / "a.npz")).open(about())


@pytest.mark.parametrize("data", [b"", b"PK no zip", b"\x93NUMPY"])
def test_a_file_of_another_program_is_not_changed(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.npz").write_bytes(data)
    with pytest.raises(UserError, match="exists and was not written by this command"):
        NpzOutput(str(tmp_path / "a.npz")).open(about())
    assert (tmp_path / "a.npz").read_bytes() == data


def test_a_damaged_part_is_named(tmp_path: Path) -> None:
    output = NpzOutput(str(tmp_path / "a.npz"))
    output.open(about())
    write(output, BATCHES)
    part = tmp_path / "a.npz.parts" / "000000002.npy"
    part.write_bytes(b"x" * part.stat().st_size)
    with pytest.raises(UserError, match=r"parts/000000002.npy' is damaged: delete it"):
        output.finish(BATCHES, LABELS)
    assert not (tmp_path / "a.npz").exists()


def test_parts_that_another_command_deleted_are_named(tmp_path: Path) -> None:
    """Without a lock, as on object stores."""
    output = NpzOutput(str(tmp_path / "a.npz"))
    output.open(about())
    write(output, BATCHES)
    (tmp_path / "a.npz.parts" / "000000002.npy").unlink()
    with pytest.raises(
        UserError, match=r"000000002.npy' is missing, perhaps deleted by another command"
    ):
        output.finish(BATCHES, LABELS)


@pytest.mark.parametrize("kind", [NpzOutput, FolderOutput])
def test_one_command_at_a_time(tmp_path: Path, kind: type[NpzOutput | FolderOutput]) -> None:
    output, other = kind(str(tmp_path / "a")), kind(str(tmp_path / "a"))
    with output.lock():
        output.open(about())
        write(output, BATCHES)
        with pytest.raises(UserError, match=r"/a' is being written by process"), other.lock():
            pass
        output.finish(BATCHES, LABELS)
        if kind is FolderOutput:
            with pytest.raises(UserError, match="is being written"), other.lock():
                pass
    found = other.read_info()
    assert found == about()
    assert other.is_finished()
    assert list(tmp_path.rglob(".tmp-*")) == []
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    with other.lock():
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_unfinished_images_have_a_description(tmp_path: Path) -> None:
    for output in (NpzOutput(str(tmp_path / "a")), FolderOutput(str(tmp_path / "b"))):
        assert output.read_info() is None
        output.open(about())
        assert output.read_info() == about()
        assert not output.is_finished()
    for path in (tmp_path / "a.parts", tmp_path / "b"):
        (path / "about.json").write_text("[")
    assert NpzOutput(str(tmp_path / "a")).read_info() is None
    assert FolderOutput(str(tmp_path / "b")).read_info() is None


def test_images_in_a_folder(tmp_path: Path) -> None:
    output = FolderOutput(str(tmp_path / "out"))
    output.open(about())
    write(output, BATCHES[:2])
    (tmp_path / "out" / "000001.png").unlink()
    (tmp_path / "out" / ".tmp-1").touch()
    assert output.missing(BATCHES) == [BATCHES[0], BATCHES[2]]
    write(output, output.missing(BATCHES))
    output.finish(BATCHES, LABELS)
    names = [f"00000{n}.png" for n in range(5)]
    found = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert found == [*names, "about.json", "labels.npy"]
    image = np.asarray(Image.open(tmp_path / "out" / "000003.png"))
    np.testing.assert_array_equal(image, images(BATCHES[1])[1])
    assert np.load(tmp_path / "out" / "labels.npy").tolist() == LABELS
    with pytest.raises(UserError, match=r"batch_size 2 \(now 3\); .*another --folder"):
        FolderOutput(str(tmp_path / "out")).open(about(batch_size=3))
    (tmp_path / "out" / "about.json").write_text("{")
    with pytest.raises(UserError, match="has a description that this version cannot read"):
        FolderOutput(str(tmp_path / "out")).open(about())
    (tmp_path / "out" / "about.json").unlink()
    with pytest.raises(UserError, match=r"has files and no about\.json"):
        FolderOutput(str(tmp_path / "out")).open(about())


def test_images_are_streamed_into_the_file(tmp_path: Path) -> None:
    """48 MB of images in pieces of 1 MB: memory holds only a few of them."""
    shape = (16, 1024, 1024, 3)
    tracemalloc.start()
    try:
        pieces = (bytes([n]) * (1 << 20) for n in range(48))
        write_npz(tmp_path / "a.npz", shape, pieces, np.zeros(16), {"a": 1})
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 8 << 20
    with zipfile.ZipFile(tmp_path / "a.npz") as archive:
        assert archive.testzip() is None
        entry = archive.getinfo("arr_0.npy")
        assert entry.compress_type == zipfile.ZIP_STORED
        assert entry.file_size == len(npy_header(shape)) + (48 << 20)


def test_missing_images_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="lack 5 bytes"):
        write_npz(tmp_path / "a.npz", (1, 2, 2, 3), [b"1234567"], np.zeros(1), {})


def test_arithmetic() -> None:
    assert choose_arithmetic("auto", "cpu") == "float32"
    assert choose_arithmetic("auto", "cuda") == "tf32"
    assert choose_arithmetic("bfloat16", "cpu") == "bfloat16"
    with pytest.raises(UserError, match="--precision tf32 needs a GPU"):
        choose_arithmetic("tf32", "cpu")
