from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.evaluate.features.timm_network import FeatureNetwork
from pipeline.store import Store
from schemas.errors import UserError
from tests.pipeline.evaluate.sets import about_samples, blobs

SCRIPT = Path(__file__).parents[2] / "jobs" / "evaluate.py"
NETWORK = ("--network", "test_resnet", "--network-weights", "random", "--network-size", "32")
KEYS = ["fid", "sfid", "inception_score", "precision", "recall", "fd_dinov2", "samples", "network"]


@pytest.fixture(scope="module")
def main() -> Callable[[list[str]], int]:
    spec = importlib.util.spec_from_file_location("evaluate_job", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module.main


@pytest.fixture
def run(
    main: Callable[[list[str]], int], capsys: pytest.CaptureFixture[str]
) -> Callable[..., dict[str, Any]]:
    def evaluate(*options: str | Path) -> dict[str, Any]:
        assert main([*map(str, options), "--json", "--device", "cpu", "--batch-size", "7"]) == 0
        lines = capsys.readouterr().out.splitlines()
        return json.loads(lines[-1]) if lines else {}

    return evaluate


def _array(images: torch.Tensor) -> np.ndarray:
    return images.permute(0, 2, 3, 1).numpy()


@pytest.fixture
def files(tmp_path: Path) -> Path:
    about = about_samples().model_dump_json()
    np.savez(tmp_path / "samples.npz", _array(blobs(20, seed=0)), about=np.array(about))
    np.savez_compressed(tmp_path / "real.npz", _array(blobs(23, seed=1, mean=100)))
    folder = tmp_path / "pictures"
    for number, image in enumerate(_array(blobs(23, seed=1, mean=100))):
        place = folder / f"class{number % 3}" / f"{number}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(place)
    (folder / "readme.txt").write_text("not a picture")
    return tmp_path


def test_one_object_with_all_keys(run: Callable[..., dict[str, Any]], files: Path) -> None:
    found = run("--samples", files / "samples.npz", "--reference", files / "real.npz", *NETWORK)
    assert list(found) == KEYS
    assert found["fid"] > 0
    assert 0 <= found["precision"] <= 1
    assert found["samples"] == 20
    assert found["network"] == "test_resnet"
    assert found["sfid"] is found["inception_score"] is found["fd_dinov2"] is None


def test_folder_archive_and_statistics_give_the_same(
    run: Callable[..., dict[str, Any]], files: Path
) -> None:
    dinov2 = (
        *("--dinov2", "test_vit", "--dinov2-weights", "random"),
        *("--dinov2-size", "32", "--manifold-images", "15"),
    )
    sides = ("--samples", files / "samples.npz", *NETWORK, *dinov2)
    expected = run(*sides, "--reference", files / "real.npz")
    assert expected["fd_dinov2"] > 0
    assert run(
        *("--reference", files / "real.npz", "--save-reference", files / "ref.npz"),
        *(*NETWORK, *dinov2),
    ) == {"save_reference": str(files / "ref.npz")}
    assert run(*sides, "--reference", files / "ref.npz") == pytest.approx(expected)
    pictures = run(*sides, "--reference", files / "pictures")
    assert pictures["fid"] == pytest.approx(expected["fid"], rel=1e-4)  # another order of images
    same = run("--samples", files / "real.npz", "--reference", files / "real.npz", *NETWORK)
    assert same["fid"] == pytest.approx(0, abs=1e-6)
    assert (same["precision"], same["recall"]) == (1, 1)
    other = [*NETWORK[:3], "random", *NETWORK[4:], "--seed", "1"]
    with pytest.raises(UserError, match=r"ref.npz' holds .* another network: its weights_sha256"):
        run("--samples", files / "samples.npz", "--reference", files / "ref.npz", *other)


def test_a_store_without_crops_is_decoded(
    run: Callable[..., dict[str, Any]],
    files: Path,
    digits_store: Store,
) -> None:
    found = run("--samples", digits_store.url, "--reference", files / "real.npz", *NETWORK)
    assert found["samples"] == 24
    assert found["fid"] > 0
    quick = ("--max-images", "9")
    assert (
        run("--samples", digits_store.url, "--reference", files / "real.npz", *NETWORK, *quick)[
            "samples"
        ]
        == 9
    )


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "evaluations.jsonl").read_text().splitlines()]


def test_evaluations_that_cannot_be_compared_have_rows_of_their_own(
    run: Callable[..., dict[str, Any]], files: Path
) -> None:
    """Rows differ by guidance, by the network's weights and by its input size; a copy of the
    reference, or its statistics alone, is the same reference."""
    folder = files / "x"
    folder.mkdir()
    guided = about_samples(sampler={"steps": 50, "guidance": 1.5}).model_dump_json()
    np.savez(files / "guided.npz", _array(blobs(20, seed=0)), about=np.array(guided))
    recorded = ("--record", folder, "--samples")
    sides = ("--reference", files / "real.npz")
    run(*recorded, files / "samples.npz", *sides, *NETWORK)
    run(*recorded, files / "guided.npz", *sides, *NETWORK)
    run(*recorded, files / "samples.npz", *sides, *NETWORK, "--seed", "1")
    run(*recorded, files / "samples.npz", *sides, *NETWORK[:-1], "64")
    run(*recorded, files / "samples.npz", "--reference", files / "guided.npz", *NETWORK)
    rows = rows_of(folder)
    assert len(rows) == 5
    assert len({row["network_identity"]["weights_sha256"] for row in rows}) == 2
    assert {row["network_identity"]["size"] for row in rows} == {32, 64}
    assert len({row["reference_sha256"] for row in rows[:1] + rows[4:]}) == 2
    run("--reference", files / "real.npz", "--save-reference", files / "ref.npz", *NETWORK)
    run(*recorded, files / "samples.npz", "--reference", files / "ref.npz", *NETWORK)
    again = rows_of(folder)
    assert len(again) == 5
    assert again[-1]["reference"] == str(files / "ref.npz")
    assert again[-1]["reference_sha256"] == rows[0]["reference_sha256"]


def test_rows_of_earlier_versions_are_kept(run: Callable[..., dict[str, Any]], files: Path) -> None:
    folder = files / "x"
    folder.mkdir()
    old = {"step": 300, "fid": 1.0, "samples": 20, "network": "test_resnet", "weights": "model"}
    old["reference"] = str(files / "real.npz")
    (folder / "evaluations.jsonl").write_text(json.dumps(old) + "\n")
    sides = ("--reference", files / "real.npz", *NETWORK, "--record", folder)
    run("--samples", files / "samples.npz", *sides)
    assert rows_of(folder)[0] == old
    assert len(rows_of(folder)) == 2


def test_samples_of_another_run_are_not_recorded(
    run: Callable[..., dict[str, Any]], files: Path
) -> None:
    (files / "y").mkdir()
    sides = ("--reference", files / "real.npz", *NETWORK, "--record", files / "y")
    with pytest.raises(
        UserError, match=r"--record '.*/y': the samples are recorded as those of '/runs/x"
    ):
        run("--samples", files / "samples.npz", *sides)
    assert not (files / "y" / "evaluations.jsonl").exists()


def test_record_replaces_its_own_row(run: Callable[..., dict[str, Any]], files: Path) -> None:
    folder = files / "x"
    folder.mkdir()
    sides = ("--reference", files / "real.npz", *NETWORK, "--record", folder)
    run("--samples", files / "samples.npz", *sides)
    found = run("--samples", files / "samples.npz", *sides, "--k", "2")
    run("--samples", files / "real.npz", *sides, "--step", "100")
    rows = rows_of(folder)
    assert [(row["step"], row["weights"]) for row in rows] == [(100, "ema"), (300, "model")]
    assert {key: rows[1][key] for key in KEYS} == found
    assert rows[1]["reference"] == str(files / "real.npz")
    assert rows[0]["sampling"] is None
    assert rows[1]["sampling"] == about_samples().sampling.model_dump(mode="json")
    with pytest.raises(UserError, match="give --step N"):
        run("--samples", files / "real.npz", *sides)
    for option, value, described in (("--step", "100", "300"), ("--weights", "ema", "model")):
        with pytest.raises(
            UserError, match=f"{option} {value}: the samples are described as {described}"
        ):
            run("--samples", files / "samples.npz", *sides, option, value)
    with pytest.raises(UserError, match="no such folder"):
        run("--samples", files / "samples.npz", *sides[:-1], files / "nowhere")


def test_a_folder_of_samples_is_recorded_at_its_step(
    run: Callable[..., dict[str, Any]], files: Path
) -> None:
    (files / "pictures" / "about.json").write_text(about_samples(step=200).model_dump_json())
    (files / "x").mkdir()
    sides = ("--samples", files / "pictures", "--reference", files / "real.npz", *NETWORK)
    run(*sides, "--record", files / "x")
    (row,) = rows_of(files / "x")
    assert (row["step"], row["weights"]) == (200, "model")


def test_record_at_a_url(run: Callable[..., dict[str, Any]], files: Path) -> None:
    """Existing rows stay."""
    memory = fsspec.filesystem("memory")
    place = "/recorded/x/evaluations.jsonl"
    sides = ("--samples", files / "samples.npz", "--reference", files / "real.npz", *NETWORK)
    url = "memory://recorded/x"
    with pytest.raises(UserError, match=r"--record 'memory://recorded/x': no such folder"):
        run(*sides, "--record", url)
    memory.pipe_file(place, b"{}\n")
    with pytest.raises(UserError, match=r"line 1 of 'memory:///recorded/x/evaluations.jsonl' is"):
        run(*sides, "--record", url)
    row = {"network": "other", "samples": 9, "weights": "ema", "reference": "r"}
    memory.pipe_file(place, json.dumps({"step": 400, **row}).encode() + b"\n")
    found = run(*sides, "--record", url)
    rows = [json.loads(line) for line in memory.cat_file(place).decode().splitlines()]
    assert [row["step"] for row in rows] == [300, 400]
    assert {key: rows[0][key] for key in KEYS} == found


def test_moments_alone_leave_precision_null(
    run: Callable[..., dict[str, Any]], files: Path
) -> None:
    """Also a file without features; one without a network's name is Inception's, as ADM's are."""
    run("--reference", files / "real.npz", "--save-reference", files / "ref.npz", *NETWORK)
    with np.load(files / "ref.npz") as saved:
        parts = {name: saved[name] for name in ("mu", "sigma", "about")}
    np.savez(files / "moments.npz", **parts)
    found = run("--samples", files / "samples.npz", "--reference", files / "moments.npz", *NETWORK)
    assert found["fid"] > 0
    assert found["precision"] is found["recall"] is None
    np.savez(files / "three.npz", arr_0=_array(blobs(3, seed=2)))  # too few for 3 neighbours
    few = run("--samples", files / "three.npz", "--reference", files / "moments.npz", *NETWORK)
    assert few["fid"] > 0
    with pytest.raises(UserError, match=r"--samples has 3 images, .* a smaller --k"):
        run("--samples", files / "three.npz", "--reference", files / "ref.npz", *NETWORK)
    np.savez(files / "adm.npz", mu=parts["mu"], sigma=parts["sigma"])
    with pytest.raises(UserError, match=r"count as Inception's .* --network 'test_resnet'"):
        run("--samples", files / "samples.npz", "--reference", files / "adm.npz", *NETWORK)


def test_few_images_suffice_for_statistics_without_a_comparison(
    run: Callable[..., dict[str, Any]], files: Path
) -> None:
    np.savez(files / "three.npz", arr_0=_array(blobs(3, seed=2)))
    run("--reference", files / "three.npz", "--save-reference", files / "ref.npz", *NETWORK)
    assert (files / "ref.npz").exists()
    with pytest.raises(UserError, match=r"--reference has 3 images, .* a smaller --k"):
        run("--samples", files / "samples.npz", "--reference", files / "three.npz", *NETWORK)


def _cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-400])


def _bomb(path: Path) -> None:
    np.savez_compressed(path, arr_0=np.zeros((1, 8192, 8192, 3), np.uint8))


def _save(**arrays: Any) -> Callable[[Path], None]:
    return lambda path: np.savez(path, **arrays)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_cut_short, "damaged, cut short"),
        (_save(arr_0=np.zeros((4, 8, 8, 3))), "is float64 .*images are uint8"),
        (_save(arr_0=np.zeros((4, 8, 8), np.uint8)), "images are uint8"),
        (_save(arr_0=np.array([{}, {}], object)), "Python objects"),
        (_save(arr_0=np.empty((4, 0, 8, 3), np.uint8)), "images of 8x0 pixels"),
        (_bomb, "images of 8192x8192 pixels.*at most 16777216: scale the images"),
        (_save(images=np.zeros((4, 8, 8, 3), np.uint8)), "holds no images.*found: images"),
        (_save(arr_0=np.zeros((1, 8, 8, 3), np.uint8)), "has 1 images"),
        (_save(arr_0=np.zeros((3, 8, 8, 3), np.uint8)), "smaller --k"),
        (_save(arr_0=np.zeros((4, 8, 8, 3), np.uint8), about=np.array("{")), "not JSON"),
        (lambda path: path.write_bytes(b"nonsense"), "damaged, cut short"),
        (lambda path: path.unlink(), "no such file"),
    ],
)
def test_bad_samples_are_named_in_one_line(
    run: Callable[..., dict[str, Any]],
    files: Path,
    make: Callable[[Path], Any],
    message: str,
) -> None:
    make(files / "samples.npz")
    with pytest.raises(UserError, match=f"--samples.*{message}"):
        run("--samples", files / "samples.npz", "--reference", files / "real.npz", *NETWORK)


def test_bad_folders_are_named(run: Callable[..., dict[str, Any]], files: Path) -> None:
    sides = ("--samples", files / "samples.npz", *NETWORK, "--reference")
    (files / "empty").mkdir()
    with pytest.raises(UserError, match=r"--reference .* has no images"):
        run(*sides, files / "empty")
    with pytest.raises(UserError, match=r"--reference .* does not exist"):
        run(*sides, files / "nowhere")
    odd = files / "pictures" / "class0" / "odd.png"
    Image.new("RGB", (40, 30)).save(odd)
    with pytest.raises(UserError, match=r"--reference .* pixels, others .*--resolution N"):
        run(*sides, files / "pictures")
    assert run(*sides, files / "pictures", "--resolution", "16")["fid"] > 0
    odd.write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"class0/odd.png: not an image"):
        run(*sides, files / "pictures")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "--reference is missing"),
        (("--reference", "x.npz"), "--samples is missing"),
        (("--reference", "x", "--save-reference", "y"), "must end in .npz"),
        (("--reference", "x.npz", "--samples", "y.npz", "--network", "test_resnet"), "-weights is"),
        (("--reference", "x.npz", "--samples", "y.npz", "--network-size", "32"), "--network ID"),
        (("--reference", "x.npz", "--save-reference", "y.npz", "--record", "r"), "--samples"),
    ],
)
def test_options_that_do_not_go_together(
    run: Callable[..., dict[str, Any]], options: tuple[str, ...], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        run(*options)


def test_rows_that_are_not_json_are_refused_before_the_work(
    run: Callable[..., dict[str, Any]], files: Path
) -> None:
    (files / "nan").mkdir()
    (files / "nan" / "evaluations.jsonl").write_text('{"step": 1, "fid": NaN}\n')
    sides = ("--samples", files / "samples.npz", "--reference", files / "real.npz", *NETWORK)
    with pytest.raises(UserError, match=r"line 1 of '.*evaluations.jsonl' is not an evaluation"):
        run(*sides, "--record", files / "nan", "--step", "1")


class TinyInception(FeatureNetwork):
    """A network in Inception's place whose input size stands for the resizing."""

    def __init__(self, weights: str, *, device: str, resizing: str = "tensorflow") -> None:
        super().__init__(
            "test_resnet", "random", size=32 if resizing == "tensorflow" else 24, device=device
        )
        self.name, self.resizing = "inception-v3", resizing

    @property
    def identity(self) -> dict[str, Any]:
        return {**super().identity, "resizing": self.resizing}


def test_both_resizings_of_inception(
    run: Callable[..., dict[str, Any]], files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = "pipeline.evaluate.features.inception.InceptionNetwork"
    monkeypatch.setattr(place, TinyInception)
    sides = ("--samples", files / "samples.npz", "--reference")
    one = run(*sides, files / "real.npz")
    other = run(*sides, files / "real.npz", "--inception-resizing", "pytorch")
    assert (one["inception_resizing"], other["inception_resizing"]) == ("tensorflow", "pytorch")
    assert "fid_pytorch" not in one
    saved = ("--save-reference", files / "ref.npz")
    both = run(*sides, files / "real.npz", "--inception-resizing", "both", *saved)
    assert both["fid"] == one["fid"] != other["fid"]
    assert both["fid_pytorch"] == pytest.approx(other["fid"])
    again = run(*sides, files / "ref.npz", "--inception-resizing", "both")
    assert again == pytest.approx(both)
    assert run(*sides, files / "ref.npz")["fid"] == pytest.approx(one["fid"])
    with pytest.raises(UserError, match="resizing is tensorflow, here it is pytorch"):
        run(*sides, files / "ref.npz", "--inception-resizing", "pytorch")
    with np.load(files / "ref.npz") as stored:
        np.savez(files / "moments.npz", mu=stored["mu_pytorch"], sigma=stored["sigma_pytorch"])
    theirs = run(*sides, files / "moments.npz", "--inception-resizing", "pytorch")
    assert theirs["fid"] == pytest.approx(other["fid"])
    with pytest.raises(UserError, match="is of Inception, and --network is another"):
        run(*sides, files / "real.npz", *NETWORK, "--inception-resizing", "both")


def test_clip_score_of_captioned_samples(
    run: Callable[..., dict[str, Any]], files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pairs that the network gets, in an .npz and in a folder, which is read in another
    order."""
    seen: list[tuple[bytes, str]] = []

    class Recorded:
        name = "recorded"

        def __init__(self, name: str, weights: str, **_: Any) -> None:
            assert (name, weights) == ("openai/clip-vit-large-patch14", "random")

        def add(self, images: torch.Tensor, captions: list[str]) -> None:
            pairs = zip(_array(images), captions, strict=True)
            seen.extend((image.tobytes(), caption) for image, caption in pairs)

        def score(self) -> float:
            return 12.5

    monkeypatch.setattr("pipeline.evaluate.features.clip.ClipScore", Recorded)
    images = _array(blobs(20, seed=0))
    captions = [f"caption {number}" for number in range(20)]
    expected = sorted((im.tobytes(), text) for im, text in zip(images, captions, strict=True))
    np.savez(files / "texts.npz", images, captions=np.array(captions))
    folder = files / "samples"
    folder.mkdir()
    for number, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{number:06d}.png")
    lines = [{"file": f"{n:06d}.png", "captions": [text]} for n, text in enumerate(captions)]
    (folder / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    rest = ("--reference", files / "real.npz", *NETWORK, "--clip-weights", "random")
    for place in (files / "texts.npz", folder):
        found = run("--samples", place, *rest)
        assert (found["clip_score"], found["clip"]) == (12.5, "recorded")
        assert sorted(seen) == expected
        seen.clear()
    run("--samples", files / "texts.npz", *rest, "--max-images", "9")
    assert [text for _, text in seen] == captions[:9]
    with pytest.raises(UserError, match="--samples has no captions: expected 'captions'"):
        run("--samples", files / "samples.npz", *rest)
    (folder / "captions.jsonl").write_text(json.dumps(lines[0]))
    with pytest.raises(UserError, match=r"captions.jsonl has no caption of 0000\d\d.png"):
        run("--samples", folder, *rest)
    np.savez(files / "texts.npz", images, captions=np.array(captions[:3]))
    with pytest.raises(UserError, match="expected a text for each image"):
        run("--samples", files / "texts.npz", *rest)
