"""`python -m pipeline.inspect`: the page, the JSON line and the picture."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.inspect.__main__ import main
from pipeline.inspect.summary import summarise
from pipeline.store import Store, StreamReader
from schemas.errors import UserError
from tests.helpers import SIZES, known_key

Capture = pytest.CaptureFixture[str]


def stream_bytes(store: Store) -> dict[str, int]:
    return {
        stream: sum(path.stat().st_size for path in Path(store.root, stream).glob("*.tar"))
        for stream in store.manifest.streams
    }


def json_of(capsys: Capture, *argv: str) -> dict[str, object]:
    assert main([*argv, "--json"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    found = json.loads(line)
    assert isinstance(found, dict)
    return found


def test_json_is_one_line_with_samples_completeness_and_bytes(
    known_store: Store, capsys: Capture
) -> None:
    sizes = stream_bytes(known_store)
    found = json_of(capsys, known_store.url)
    assert found == {
        "samples": sum(SIZES),
        "complete": True,
        "streams": sizes,
        "bytes_per_image": pytest.approx(sum(sizes.values()) / sum(SIZES)),
        "fixed_bytes": Path(known_store.root, "manifest.json").stat().st_size,
    }
    assert isinstance(found["samples"], int)
    assert all(isinstance(size, int) for size in found["streams"].values())  # type: ignore[attr-defined]


def test_the_page_says_what_the_store_is(known_store: Store, capsys: Capture) -> None:
    assert main([known_store.url]) == 0
    page = capsys.readouterr().out
    manifest = known_store.manifest
    assert page.startswith(f"{known_store.url}: complete")
    for text in (
        "12 in 4 shards of 5",
        manifest.teacher_stream()[1].teacher.model,
        "latents:",
        "maps:",
        "1, 2, 3",
    ):
        assert text in page


def test_incomplete_store_says_so(known_store: Store, capsys: Capture) -> None:
    for name in ("commits/shard-000000.json", "commits/shard-000003.json", "index.json"):
        Path(known_store.root, name).unlink()
    found = json_of(capsys, known_store.url)
    assert (found["samples"], found["complete"]) == (3, False)
    assert main([known_store.url]) == 0
    page = capsys.readouterr().out
    assert "INCOMPLETE: 2 of 4 shards are missing (first: 0)" in page


def test_a_record_that_vanished_counts_though_the_index_has_it(known_store: Store) -> None:
    Path(known_store.root, "commits", "shard-000001.json").unlink()
    summary = summarise(Store.open(known_store.url))
    assert summary.missing_shards == [1]
    assert (summary.samples, summary.complete) == (9, False)


def test_a_store_without_any_shard_is_told_about(known_store: Store, capsys: Capture) -> None:
    for folder in ("commits", "latents", "maps"):
        shutil.rmtree(Path(known_store.root, folder))
    Path(known_store.root, "index.json").unlink()
    found = json_of(capsys, known_store.url)
    assert found == {
        "samples": 0,
        "complete": False,
        "streams": {"latents": 0, "maps": 0},
        "bytes_per_image": 0.0,
        "fixed_bytes": Path(known_store.root, "manifest.json").stat().st_size,
    }
    assert main([known_store.url]) == 0


def test_a_real_store_is_summed_up(digits_store: Store, capsys: Capture) -> None:
    found = json_of(capsys, digits_store.url)
    assert (found["samples"], found["complete"]) == (24, True)
    assert found["streams"] == stream_bytes(digits_store)


def test_a_page_begins_with_the_images_of_each_class(digits_store: Store, capsys: Capture) -> None:
    labels = [
        label
        for shard, count in enumerate(digits_store.index().samples_per_shard)
        for label in StreamReader(digits_store, "latents")
        .read(np.full(count, shard), np.arange(count))["label"]
        .tolist()
    ]
    most = max(sorted(set(labels)), key=labels.count)
    assert main([digits_store.url]) == 0
    line = capsys.readouterr().out.splitlines()[1]
    start = f"  images       24 in {len(set(labels))} classes: {labels.count(most)} of class "
    assert line.startswith(start)


def test_a_contact_sheet_has_a_row_for_each_class(
    digits_store: Store, tmp_path: Path, capsys: Capture
) -> None:
    from pipeline.visualization.contact_sheet import find_images

    png = tmp_path / "new" / "sheet.png"
    json_of(capsys, digits_store.url, "--png", str(png))
    places = find_images(digits_store, list(range(10)), 8)
    rows = [label for label in range(10) if places[label]]
    with Image.open(png) as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    side, gap = 96, 2
    margin = pixels.shape[1] - gap - 8 * (side + gap)
    assert pixels.shape[0] == gap + len(rows) * (side + gap)
    from pipeline.visualization.store_sample import decode_latent

    for row, label in enumerate(rows):
        top = gap + row * (side + gap)
        for column in range(8):
            left = margin + gap + column * (side + gap)
            found = pixels[top : top + side : 3, left : left + side : 3]
            if column < len(places[label]):
                shard, number = places[label][column]
                reader = StreamReader(digits_store, "latents")
                sample = reader.read(np.array([shard]), np.array([number]))
                assert sample["label"][0] == label
                expected = decode_latent(digits_store, sample["mean"][0]).astype(int)
                assert np.abs(found - expected).max() <= 1
            else:
                assert (found == 255).all()
    with pytest.raises(UserError, match="is not an image format"):
        main([digits_store.url, "--png", str(tmp_path / "x.nonsense")])


def test_a_sample_is_drawn(digits_store: Store, tmp_path: Path, capsys: Capture) -> None:
    key = digits_store.record(2).keys[1]
    png = tmp_path / "new" / "folder" / "sample.png"
    found = json_of(capsys, digits_store.url, "--sample", key, "--png", str(png))
    assert found["samples"] == 24
    with Image.open(png) as picture:
        assert picture.format == "PNG"
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    layers = digits_store.manifest.teacher_stream()[1].teacher.layers
    panels = 2 + len(layers)  # the latent, the features, each layer
    height, width, _ = pixels.shape
    assert width > 100 * panels
    assert height > 300
    for panel in np.array_split(pixels[height // 8 : height // 3], panels, axis=1):
        painted = np.abs(panel - 255).sum(-1) > 0
        assert painted.mean() > 0.4
        assert len(np.unique(panel.reshape(-1, 3), axis=0)) > 20


def test_different_samples_give_different_pictures(digits_store: Store, tmp_path: Path) -> None:
    pictures = []
    for row in (0, 0, 1):
        png = tmp_path / f"{len(pictures)}.png"
        main([digits_store.url, "--sample", digits_store.record(0).keys[row], "--png", str(png)])
        with Image.open(png) as picture:
            pictures.append(np.asarray(picture))
    assert np.array_equal(pictures[0], pictures[1])
    assert not np.array_equal(pictures[0], pictures[2])


def test_the_drawn_latent_decodes_to_the_digit(digits_store: Store) -> None:
    from pipeline.datasets.digits import digits_images
    from pipeline.visualization.store_sample import decode_latent

    images, labels = digits_images(32)
    batch = StreamReader(digits_store, "latents").read(np.zeros(10, int), np.arange(10))
    for row, key in enumerate(digits_store.record(0).keys):
        number = int(key.removeprefix("digit-"))
        decoded = decode_latent(digits_store, batch["mean"][row])
        assert decoded.shape == (32, 32, 3)
        assert np.abs(decoded.astype(int) - images[number]).mean() < 16
        assert batch["label"][row] == labels[number]


def test_unknown_key_is_one_line_that_shows_what_keys_look_like(
    known_store: Store, tmp_path: Path
) -> None:
    png = tmp_path / "x.png"
    with pytest.raises(UserError, match="--sample 'nobody' is not in") as error:
        main([known_store.url, "--sample", "nobody", "--png", str(png)])
    assert known_key(0, 0) in str(error.value)
    assert not png.exists()


@pytest.mark.parametrize(
    ("argv", "reason"),
    [
        ([], "STORE is missing"),
        (["/no/such/store"], "holds no store"),
        (["x", "--sample", "a"], "go together"),
        (["x", "--png", "a.png"], "holds no store"),
        (["x", "--png", "a.png", "--verify"], "cannot be combined"),
        (["x", "--jsn"], "did you mean '--json'"),
    ],
)
def test_bad_requests_are_one_line(argv: list[str], reason: str) -> None:
    with pytest.raises(UserError, match=reason) as error:
        main(argv)
    assert "\n" not in str(error.value)


def test_as_a_command_stdout_is_the_object_and_errors_go_to_stderr(known_store: Store) -> None:
    command = [sys.executable, "-m", "pipeline.inspect", "--json"]
    done = subprocess.run([*command, known_store.url], capture_output=True, text=True, check=True)
    assert done.stdout.count("\n") == 1
    assert json.loads(done.stdout)["samples"] == sum(SIZES)
    failed = subprocess.run([*command, "/no/such"], capture_output=True, text=True, check=False)
    assert (failed.returncode, failed.stdout) == (2, "")
    assert failed.stderr.startswith("error: --store '/no/such'")
    assert failed.stderr.count("\n") == 1


@pytest.mark.parametrize("name", ["file/x.png", "x.nonsense", "folder"])
def test_a_picture_that_cannot_be_written_is_one_line(
    digits_store: Store, tmp_path: Path, name: str
) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    key = digits_store.record(0).keys[0]
    png = tmp_path / name
    with pytest.raises(UserError, match=f"^--png '{png}' cannot be written: ") as error:
        main([digits_store.url, "--sample", key, "--png", str(png)])
    assert "\n" not in str(error.value)


def test_names_in_a_store_do_not_reach_the_terminal_raw(
    known_store: Store, capsys: Capture
) -> None:
    path = Path(known_store.root, "manifest.json")
    values = json.loads(path.read_text())
    values["dataset"]["source"] = "\x1b[31mred\nline"
    path.write_text(json.dumps(values))
    assert main([known_store.url]) == 0
    page = capsys.readouterr().out
    assert "\x1b" not in page
    assert "\\x1b[31mred\\nline" in page


def test_an_autoencoder_for_other_latents_is_one_line(digits_store: Store) -> None:
    from pipeline.visualization.store_sample import decode_latent

    with pytest.raises(UserError, match=r"'demo' cannot decode latents of shape \(3, 8, 8\)"):
        decode_latent(digits_store, np.zeros((3, 8, 8), np.float32))
