"""`python -m pipeline.quickstart`: layouts of sources, choices, configs and commands."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import re
import shlex
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.cli.config_files import read_yaml
from pipeline.cli.options import parse_options
from pipeline.datasets import list_images, open_reader
from pipeline.quickstart import proposal
from pipeline.quickstart.__main__ import _name, main
from pipeline.quickstart.layout import find_layout
from pipeline.quickstart.machine import Machine
from pipeline.quickstart.survey import survey_source
from schemas.errors import UserError
from schemas.extract import ExtractConfig
from schemas.report import ReportConfig
from schemas.run import RunConfig
from schemas.validation import validate

Capture = pytest.CaptureFixture[str]
ROOT = Path(__file__).parents[3]
GPU = Machine(16, 1, "H200", 140 << 30, 1 << 37, 1 << 44, 1 << 36)
CPU = Machine(2, 0, "", 0, 1 << 34, 1 << 44, 1 << 33)


def write_image(path: Path, size: tuple[int, int], mode: str = "RGB", seed: int = 0) -> None:
    generator = np.random.default_rng(seed)
    shape = (*size[::-1], 3) if mode == "RGB" else size[::-1]
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(generator.integers(0, 256, shape, dtype=np.uint8)).save(path)


def ten_classes(folder: Path) -> None:
    for n in range(20):
        write_image(folder / f"class{n % 10}" / f"{n}.png", (32, 32), seed=n)


def photographs(folder: Path) -> None:
    for n in range(12):
        write_image(folder / ["cat", "dog", "owl"][n % 3] / f"{n}.jpg", (90 + 9 * n, 170 - 7 * n))


def grey_digits(folder: Path) -> None:
    for n in range(12):
        write_image(folder / str(n % 3) / f"{n}.png", (28, 28), "L", seed=n)


def one_class(folder: Path) -> None:
    for n in range(9):
        write_image(folder / f"{n}.png", (64, 64), seed=n)
    (folder / "notes.txt").write_text("not an image")


FOLDERS: dict[str, tuple[Callable[[Path], None], int, list[str], int]] = {
    "ten": (ten_classes, 20, [f"class{n}" for n in range(10)], 32),
    "photos": (photographs, 12, ["cat", "dog", "owl"], 64),
    "grey": (grey_digits, 12, ["0", "1", "2"], 32),
    "one": (one_class, 9, ["one"], 64),
}
"""Writer of each folder, its images, classes and the crop on a machine without a GPU."""


def proposed(capsys: Capture, source: Path, work: Path, *more: str) -> dict[str, Any]:
    assert main(["--source", str(source), "--work", str(work), "--json", *more]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    found = json.loads(line)
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize("name", FOLDERS)
def test_configs_and_commands_of_a_folder(
    name: str, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, images, classes, resolution = FOLDERS[name]
    write(tmp_path / name)
    monkeypatch.setattr("pipeline.quickstart.machine.look_at_machine", lambda work: CPU)
    monkeypatch.setattr(proposal, "at_hand", lambda *_: "is not in the cache")
    found = proposed(capsys, tmp_path / name, tmp_path / "w", "--hours", "0.01")
    assert list(found) == ["images", "classes", "commands", "seconds", "bytes", "files"]
    assert (found["images"], found["classes"]) == (images, classes)
    assert found["seconds"] > 0
    assert found["bytes"] > 0
    extract_file, train_file = map(Path, found["files"])
    config = validate(ExtractConfig, read_yaml(extract_file), where="extract")
    run = validate(RunConfig, read_yaml(train_file), where="train")
    assert config.resolution == resolution
    assert config.pretrain is not None
    assert config.pretrain.flip == (name != "grey")
    assert run.student.num_classes == len(classes)
    assert run.store == config.store
    assert 0 < run.alignment.termination.step < run.steps  # type: ignore[union-attr]
    assert run.global_batch <= images
    assert len(list_images(config).items) == images + (name == "one")
    assert len(found["commands"]) == 3
    words = [shlex.split(command) for command in found["commands"]]
    assert words[0][1:] == ["-m", "pipeline.extract", "--config", str(extract_file)]
    assert words[1][1].endswith("jobs/train_haste.py")
    assert words[2][1].endswith("jobs/sample.py")
    assert Path(words[2][words[2].index("--checkpoint") + 1]) == Path(run.output, run.name)
    before = [file.read_bytes() for file in (extract_file, train_file)]
    assert proposed(capsys, tmp_path / name, tmp_path / "w", "--hours", "0.01") == found
    assert [file.read_bytes() for file in (extract_file, train_file)] == before


def test_each_option_of_a_config_has_a_comment_above_it(tmp_path: Path) -> None:
    photographs(tmp_path / "photos")
    survey = survey_source(str(tmp_path / "photos"), tmp_path)
    made = proposal.propose(survey, CPU, 0.01, tmp_path)
    for options in (made.extract, made.train):
        lines = options.text().splitlines()
        for above, line in pairwise(lines):
            if not line.lstrip().startswith("#") and not line.endswith(":"):
                assert above.lstrip().startswith("# "), line


def layout_of(source: Path, work: Path) -> tuple[int, list[str], list[int]]:
    """Images, class names and labels, sorted, as the extraction lists them."""
    layout = find_layout(str(source), work)
    options = {"dataset": layout.dataset, "source": layout.source, **layout.options}
    config = validate(ExtractConfig, options, where="layout")
    listing = list_images(config)
    read = open_reader(config)
    for item in listing.items:
        Image.open(io.BytesIO(read(item))).load()
    return (
        len(listing.items),
        list(listing.class_names),
        sorted(item.label for item in listing.items),
    )


@pytest.mark.parametrize(
    ("places", "names", "labels"),
    [
        (["train/a", "train/b", "test/a"], ["a", "b"], [0, 1]),
        (["set/a", "set/b"], ["a", "b"], [0, 1]),
        (["set/Train/a", "set/val/a"], ["a"], [0]),
        (["photos"], ["photos"], [0]),
        (["a/x/y", "b"], ["a", "b"], [0, 1]),
        (["train", "test"], ["train"], [0]),
        (["."], ["source"], [0]),
        (
            ["train/n01440764", "train/n01443537", "val/n01440764"],
            ["n01440764", "n01443537"],
            [0, 1],
        ),
    ],
)
def test_folders_are_classes_splits_or_wrappers(
    places: list[str], names: list[str], labels: list[int], tmp_path: Path
) -> None:
    for place in places:
        write_image(tmp_path / "source" / place / "1.png", (16, 16))
    assert layout_of(tmp_path / "source", tmp_path / "w") == (len(labels), names, labels)


def test_an_empty_class_folder_keeps_its_number(tmp_path: Path) -> None:
    write_image(tmp_path / "s" / "c" / "1.png", (16, 16))
    (tmp_path / "s" / "a").mkdir()
    assert layout_of(tmp_path / "s", tmp_path / "w") == (1, ["a", "c"], [1])


def test_images_without_classes_are_for_folders_alone() -> None:
    options = {"dataset": "webdataset", "source": "x", "unlabelled": True}
    with pytest.raises(UserError, match="--unlabelled is for --dataset folder without"):
        list_images(validate(ExtractConfig, options, where="test"))


def test_archives_of_class_folders(tmp_path: Path) -> None:
    photographs(tmp_path / "photos")
    expected = (12, ["cat", "dog", "owl"], [0] * 4 + [1] * 4 + [2] * 4)
    files = sorted(path for path in (tmp_path / "photos").rglob("*.jpg"))
    with zipfile.ZipFile(tmp_path / "p.zip", "w") as zipped:
        for path in files:
            zipped.write(path, f"train/{path.relative_to(tmp_path / 'photos')}")
        zipped.writestr("__MACOSX/train/cat/._1.jpg", b"x")
    assert layout_of(tmp_path / "p.zip", tmp_path / "w") == expected
    (tmp_path / "held").mkdir()
    (tmp_path / "p.zip").rename(tmp_path / "held" / "p.zip")
    assert layout_of(tmp_path / "held", tmp_path / "w") == expected
    for name, mode in (("p.tar.gz", "w:gz"), ("p.tar", "w")):
        with tarfile.open(tmp_path / name, mode) as tar:  # type: ignore[call-overload]
            tar.add(tmp_path / "photos", "photos")
        assert layout_of(tmp_path / name, tmp_path / f"w_{mode[1:]}") == expected


def test_tars_of_webdataset_are_read_in_place(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16)).save(buffer, "PNG")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for n in range(3):
            for suffix, data in (("png", buffer.getvalue()), ("cls", str(n % 2).encode())):
                info = tarfile.TarInfo(f"{n}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    assert layout_of(tmp_path / "a.tar", tmp_path / "w") == (3, [], [0, 0, 1])
    assert not (tmp_path / "w").exists()


def pixels(count: int) -> np.ndarray:
    return np.arange(count * 3072).reshape(count, 3072).astype(np.uint8)


@pytest.mark.parametrize("kind", ["python", "binary", "hundred"])
def test_cifar_in_its_own_layouts(kind: str, tmp_path: Path) -> None:
    folder = tmp_path / "cifar" / "batches"
    folder.mkdir(parents=True)
    rows, labels = pixels(4), [1, 0, 1, 1]
    names = ["airplane", "automobile"]
    if kind == "binary":
        data = np.concatenate([np.array(labels, np.uint8)[:, None], rows], 1)
        (folder / "data_batch_1.bin").write_bytes(data.tobytes())
        (folder / "batches.meta.txt").write_text("\n".join(names) + "\n")
    else:
        key = b"labels" if kind == "python" else b"fine_labels"
        meta = b"label_names" if kind == "python" else b"fine_label_names"
        batch, meta_file = (
            ("data_batch_1", "batches.meta") if kind == "python" else ("train", "meta")
        )
        (folder / batch).write_bytes(pickle.dumps({b"data": rows, key: labels}, 2))
        encoded = [name.encode() for name in names]
        (folder / meta_file).write_bytes(pickle.dumps({meta: encoded}, 2))
    assert layout_of(tmp_path / "cifar", tmp_path / "w") == (4, names, [0, 1, 1, 1])
    image = np.asarray(Image.open(tmp_path / "w" / "images" / "airplane" / "000001.png"))
    assert np.array_equal(image, rows[1].reshape(3, 32, 32).transpose(1, 2, 0))


def test_mnist_in_its_own_layout(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    images = np.arange(3 * 28 * 28).reshape(3, 28, 28).astype(np.uint8)
    head = bytes([0, 0, 8, 3]) + np.array(images.shape, ">u4").tobytes()
    data = gzip.compress(head + images.tobytes())
    (tmp_path / "m" / "train-images-idx3-ubyte.gz").write_bytes(data)
    labels = bytes([0, 0, 8, 1]) + np.array([3], ">u4").tobytes() + bytes([7, 0, 7])
    with pytest.raises(UserError, match="has no labels beside it"):
        find_layout(str(tmp_path / "m"), tmp_path / "w")
    (tmp_path / "m" / "train-labels-idx1-ubyte").write_bytes(labels)
    assert layout_of(tmp_path / "m", tmp_path / "w") == (3, ["000", "007"], [0, 1, 1])


def test_no_code_of_a_pickle_is_run(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return (open, (str(tmp_path / "hit"), "w"))

    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "data_batch_1").write_bytes(pickle.dumps({b"data": Bomb()}))
    with pytest.raises(UserError, match="no code is run"):
        find_layout(str(tmp_path / "c"), tmp_path / "w")
    assert not (tmp_path / "hit").exists()


def test_bad_images_are_counted_and_left_out(tmp_path: Path, capsys: Capture) -> None:
    photographs(tmp_path / "p")
    (tmp_path / "p" / "cat" / "0.jpg").write_bytes(b"\xff\xd8 damaged")
    write_image(tmp_path / "p" / "zebra" / "1.png", (100, 100))
    (tmp_path / "p" / "zebra" / "1.png").write_bytes(b"x")
    found = proposed(capsys, tmp_path / "p", tmp_path / "w", "--hours", "0.01")
    assert found["images"] == 11
    config = validate(ExtractConfig, read_yaml(found["files"][0]), where="extract")
    assert config.on_bad_image == "skip"
    assert config.allow_empty_classes
    assert "--classes 0-2 " in found["commands"][2]
    assert "'cat/0.jpg' first" in " ".join(Path(found["files"][0]).read_text().split("\n# "))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: None, "does not exist"),
        (lambda p: p.mkdir(), "has no files"),
        (lambda p: (p.mkdir(), (p / "a.txt").write_text("x")), "none of 1 files is an image"),
        (lambda p: p.write_text("x"), "is a file: expected a folder"),
        (
            lambda p: [write_image(p / d / "0" / "1.png", (8, 8)) for d in ("images", "vae-sd")],
            "is prepared for REPA",
        ),
        (lambda p: p.with_suffix(".zip").write_text("x"), "is not a readable zip"),
        (lambda p: p.with_suffix(".tgz").write_text("x"), "cannot be unpacked"),
        (lambda p: p.with_suffix(".zip").write_bytes(locked_zip()), "has a password"),
        (
            lambda p: zip_of(p.with_suffix(".zip"), "in/a.zip", "readme.txt"),
            r"no images but 1 archive, first 'in/a.zip': unpack them and give the folder",
        ),
        (
            lambda p: [write_text(p / "train" / f"{n}.tar") for n in range(2)],
            r"no images but 2 archives, first 'train/0.tar': give --source '.*/s/train'",
        ),
        (lambda p: [write_text(p / f"{n}.zip") for n in "ab"], "unpack all into one folder"),
        (
            lambda p: [write_text(p / "cat" / f"{n}.HEIC") for n in range(2)],
            r"none of 2 files is an image .*; convert files of .heic to JPEG",
        ),
    ],
)
def test_a_source_without_images_is_refused(
    make: Callable[[Path], Any], message: str, tmp_path: Path
) -> None:
    make(tmp_path / "s")
    source = next(iter(tmp_path.glob("s*")), tmp_path / "s")
    with pytest.raises(UserError, match=message) as caught:
        survey_source(str(source), tmp_path / "w")
    assert "\n" not in str(caught.value)


def write_text(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("x")


def zip_of(path: Path, *names: str) -> None:
    with zipfile.ZipFile(path, "w") as zipped:
        for name in names:
            zipped.writestr(name, b"x")


def test_the_page_of_odd_folders(
    tmp_path: Path,
    capsys: Capture,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One image, a photograph that is not read, a stray file and names of other languages."""
    monkeypatch.setattr("pipeline.quickstart.machine.look_at_machine", lambda work: CPU)
    monkeypatch.setattr(proposal, "at_hand", lambda *_: "is not in the cache")
    folder = tmp_path / "K\u00fche & K\u00e4lber"
    write_image(folder / "Stra\u00dfe 1" / "IMG 1.JPG", (90, 80))
    write_text(folder / "Stra\u00dfe 1" / "IMG 2.HEIC")
    write_text(folder / "list.txt")
    options = ["--source", str(folder), "--work", str(tmp_path / "w w"), "--hours", "0.01"]
    assert main(options) == 0
    page = capsys.readouterr().out
    assert page.startswith(
        "1 image in 1 class (Stra\u00dfe 1), colour, 90x80; 1 bad of 2 examined\n"
    )
    assert not re.search(r"about [\d.]{4,} (s|min|h)", page)  # estimates have two digits
    assert "convert files of .heic to JPEG" in caplog.text
    assert "1 image: so few are memorised" in caplog.text
    train = validate(RunConfig, read_yaml(tmp_path / "w w" / "train.yaml"), where="train")
    assert (train.global_batch, train.workers.count) == (1, 1)
    assert caplog.text.count("in no class folder") == 1
    capsys.readouterr()
    assert main(options) == 0
    assert caplog.text.count("in no class folder") == 1  # once for each command


def locked_zip() -> bytes:
    """A zip whose only member has the flag of a password."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as zipped:
        zipped.writestr("a/1.png", b"x")
    data = bytearray(buffer.getvalue())
    data[6] |= 1  # in the local header
    data[data.index(b"PK\x01\x02") + 8] |= 1  # in the directory
    return bytes(data)


def test_a_gpu_and_the_hub_give_published_networks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for n in range(4):
        write_image(tmp_path / "p" / "ab"[n % 2] / f"{n}.png", (300, 280))
    survey = survey_source(str(tmp_path / "p"), tmp_path)
    many = replace(survey, files=200_000, bad=())
    monkeypatch.setattr(proposal, "at_hand", lambda *_: None)
    made = proposal.propose(many, GPU, 48, tmp_path)
    extract = validate(ExtractConfig, made.extract.values(), where="extract")
    train = validate(RunConfig, made.train.values(), where="train")
    assert (extract.teacher.weights, extract.pretrain) == ("hub", None)
    assert extract.teacher.model == "vit_base_patch14_dinov2.lvd142m"
    assert extract.teacher.image_size == 224
    assert extract.autoencoder == "stabilityai/sd-vae-ft-mse"
    assert (extract.resolution, train.student.latent_size) == (256, 32)
    assert train.student.model in {"SiT-B/2", "SiT-L/2"}
    assert train.global_batch == 256
    monkeypatch.setattr(proposal, "at_hand", lambda *_: "cannot be reached")
    alone = proposal.propose(many, GPU, 48, tmp_path)
    extract = validate(ExtractConfig, alone.extract.values(), where="extract")
    assert extract.pretrain is not None
    assert extract.pretrain.widths == (64, 128, 256, 256)
    assert "cannot be reached" in alone.extract.text()


def test_more_hours_give_more_steps_and_a_larger_student(tmp_path: Path) -> None:
    ten_classes(tmp_path / "ten")
    survey = replace(survey_source(str(tmp_path / "ten"), tmp_path), files=50_000)
    runs = [proposal.propose(survey, CPU, hours, tmp_path).train.values() for hours in (0.5, 1, 12)]
    assert runs[0]["steps"] < runs[1]["steps"]
    assert runs[0]["student"]["width"] < runs[2]["student"]["width"]
    seconds = sum(c.seconds for c in proposal.propose(survey, CPU, 0.5, tmp_path).commands)
    assert 0.7 * 1800 < seconds < 1.1 * 1800


def test_the_calibration_of_the_codec_is_in_the_time(tmp_path: Path) -> None:
    """Half of a small data set, 256 of a larger one, on one core."""
    ten_classes(tmp_path / "ten")
    survey = survey_source(str(tmp_path / "ten"), tmp_path)
    each = proposal.OWN_SMALL.flops(8) / 3.5e10 * (1 + 2 * 7 * 3 / 6)  # 3 of 6 blocks are later
    for files, images in ((20, 10), (50_000, 256)):
        chooser = proposal._Chooser(replace(survey, files=files), CPU, 0.5, tmp_path)
        assert chooser.grid == 8
        assert chooser._calibration_seconds(proposal.OWN_SMALL) == pytest.approx(images * each)
        without = files * chooser._image_seconds(proposal.OWN_SMALL)
        assert chooser._encoding_seconds(proposal.OWN_SMALL) == pytest.approx(
            without + images * each
        )


def test_a_config_with_other_options_is_kept(tmp_path: Path, capsys: Capture) -> None:
    grey_digits(tmp_path / "g")
    first = proposed(capsys, tmp_path / "g", tmp_path / "w", "--hours", "0.01")
    text = Path(first["files"][1]).read_text() + "# mine\n"
    Path(first["files"][1]).write_text(text)
    proposed(capsys, tmp_path / "g", tmp_path / "w", "--hours", "0.01")
    assert (tmp_path / "w" / "train.yaml.old").read_text() == text


def test_help_needs_no_torch() -> None:
    command = [sys.executable, "-X", "importtime", "-m", "pipeline.quickstart", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "--hours" in done.stdout
    assert len(done.stdout.splitlines()) < 40
    loaded = {
        line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()
    }
    assert loaded & {"torch", "ray", "timm", "diffusers", "PIL"} == set()


def test_the_printed_plan_knows_networks_that_are_not_trained_yet(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last line costs the proposal's own run, whose latents come from the own autoencoder."""
    from pipeline.extract.__main__ import main as extract

    grey_digits(tmp_path / "g")
    monkeypatch.setattr("pipeline.quickstart.machine.look_at_machine", lambda work: CPU)
    monkeypatch.setattr(proposal, "at_hand", lambda *_: "is not in the cache")
    options = ["--source", str(tmp_path / "g"), "--work", str(tmp_path / "w"), "--hours", "0.01"]
    assert main(options) == 0
    *_, line = capsys.readouterr().out.splitlines()
    words = shlex.split(line)
    assert words[1:4] == ["-m", "pipeline.extract", "--plan"]
    assert extract([*words[3:], "--json"]) == 0
    estimate = json.loads(capsys.readouterr().out)
    assert any("networks/autoencoder' is trained first" in note for note in estimate["notes"])


def test_a_whole_run_ends_on_the_page_of_its_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    grey_digits(tmp_path / "g")
    ran: list[str] = []
    monkeypatch.setattr("pipeline.quickstart.machine.look_at_machine", lambda work: CPU)
    monkeypatch.setattr("pipeline.quickstart.__main__._run", lambda name, line: ran.append(name))
    monkeypatch.setattr(proposal, "at_hand", lambda *_: "is not in the cache")
    caplog.set_level("INFO")
    work = tmp_path / "of mine"
    options = ["--source", str(tmp_path / "g"), "--work", str(work), "--hours", "0.01", "--run"]
    assert main(options) == 0
    assert ran == ["extract", "train", "sample"]
    line = caplog.messages[-1].removeprefix("next, curves and attention on a page: ")
    words = shlex.split(line)
    assert words[1:3] == ["-m", "pipeline.report"]
    page = parse_options(ReportConfig, words[3:], command="test", about="", positional="runs")
    assert (page.runs, page.html) == ((str(work / "run"),), str(work / "report.html"))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", FOLDERS)
def test_folders_become_pictures(name: str, tmp_path: Path) -> None:
    """The command with --run, in processes of its own, without network and weights."""
    write, images, classes, resolution = FOLDERS[name]
    write(tmp_path / name)
    command = [sys.executable, "-m", "pipeline.quickstart", "--source", str(tmp_path / name)]
    options = ["--work", str(tmp_path / "w"), "--hours", "0.0001", "--run", "--json"]
    done = subprocess.run([*command, *options], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["images"] == images
    with Image.open(tmp_path / "w" / "samples.png") as picture:
        assert picture.width >= 8 * resolution
        assert picture.height >= len(classes) * resolution
    report = json.loads((tmp_path / "w" / "networks" / "teacher.json").read_text())
    assert (report["results"]["knn"] is None) == (name == "one")
    psnr = json.loads((tmp_path / "w" / "networks" / "autoencoder" / "pretrain.json").read_text())
    assert psnr["results"]["psnr_db"] > 3


def test_a_work_folder_below_a_file_is_refused(tmp_path: Path) -> None:
    one_class(tmp_path / "one")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--work '.*file/w': '.*file' is not a folder"):
        main(["--source", str(tmp_path / "one"), "--work", str(tmp_path / "file" / "w")])


def test_credentials_of_a_source_are_not_printed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = "memory://user:hidden-word@nothing/images"
    with caplog.at_level("INFO"), pytest.raises(UserError) as raised:
        main(["--source", source, "--work", str(tmp_path / "w")])
    assert "looking at" in caplog.text
    assert "hidden-word" not in caplog.text + str(raised.value)


def test_a_folder_is_called_like_its_source_without_credentials() -> None:
    assert _name("https://user:word@host/cats.tar.gz?signature=abcdef") == "cats"
