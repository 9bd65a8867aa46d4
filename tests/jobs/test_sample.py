"""`jobs/sample.py`: grids, and many images by workers that may die."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import pipeline.sampling.job as module
from jobs.sample import main
from pipeline.checkpoints.local import LocalCheckpoints
from pipeline.sampling.batches import ImageBatch, choose_labels, plan_batches
from pipeline.sampling.job import SampleSummary, sample_many
from pipeline.sampling.outputs import NpzOutput
from pipeline.sampling.worker import SampledBatch, SampleWorker
from pipeline.store import Store
from pipeline.train.loop import train
from schemas.errors import UserError
from schemas.run import RunConfig
from schemas.sample import SampleConfig
from tests.forks import COMMAND
from tests.stores import tiny_run

ROOT = Path(__file__).parents[2]
NEWEST = "checkpoint-000000004"
SLOWED = """
import sys, time
sys.path.insert(0, "jobs")
from pipeline.sampling.outputs import NpzOutput
import sample

write = NpzOutput.write
def slowly(self, drawn):
    write(self, drawn)
    time.sleep(0.5)
NpzOutput.write = slowly
sample.run_command(sample.main)
"""


@pytest.fixture(scope="module")
def run(random_store: Store, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained run of a tiny SiT with 5 classes."""
    folder = tmp_path_factory.mktemp("run")
    config = RunConfig.model_validate(
        {**tiny_run(), "steps": 4, "store": random_store.url, "checkpoint": {"every": 2}}
    )
    train(config, folder, LocalCheckpoints(folder, keep=2).save)
    return folder


Sample = Callable[..., SampleSummary]


def options(run: Path, **overrides: Any) -> dict[str, Any]:
    return {
        "checkpoint": str(run),
        "autoencoder": "demo",
        "num": 12,
        "labels": "balanced",
        "batch_size": 3,
        "sampler": {"method": "sde", "steps": 3, "guidance": 1.5, "guidance_high": 0.7},
        "workers": {"count": 1, "cpus_per_worker": 0.5},
        **overrides,
    }


@pytest.fixture
def draw(run: Path) -> Sample:
    def sample(**overrides: Any) -> SampleSummary:
        return sample_many(SampleConfig.model_validate(options(run, **overrides)))

    return sample


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of the batches that were drawn and written."""
    numbers: list[int] = []
    write = NpzOutput.write

    def counted(self: NpzOutput, result: SampledBatch) -> None:
        write(self, result)
        numbers.append(result.batch.number)

    monkeypatch.setattr(NpzOutput, "write", counted)
    return numbers


@pytest.fixture(scope="module")
def expected(run: Path) -> np.ndarray[Any, Any]:
    """30 images, drawn in this process."""
    config = SampleConfig.model_validate(options(run, num=30))
    threads = torch.get_num_threads()
    worker = SampleWorker()
    worker.load(config, str(run), "cpu", 1)
    batches = plan_batches(30, config.batch_size)
    labels = [choose_labels("balanced", range(5), 0, b.first, b.count) for b in batches]
    images = [worker.draw(b, of, pngs=False).images for b, of in zip(batches, labels, strict=True)]
    torch.set_num_threads(threads)
    return np.concatenate(images)


@pytest.mark.usefixtures("two_cpus")
def test_images_do_not_depend_on_the_workers_or_their_deaths(
    draw: Sample,
    run: Path,
    tmp_path: Path,
    drawn: list[int],
    expected: np.ndarray[Any, Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    """One worker; two, of which one is killed with a batch; none needed."""
    marker = tmp_path / "died"

    class DiesOnce(SampleWorker):
        def draw(self, batch: ImageBatch, labels: list[int], *, pngs: bool) -> SampledBatch:
            if batch.number == 1 and not marker.exists():
                marker.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return super().draw(batch, labels, pngs=pngs)

    one = draw(npz=str(tmp_path / "one.npz"), folder=str(tmp_path / "pictures"))
    assert (one.images, one.resumed, one.labels) == (12, 0, "balanced")
    assert one.images_per_second > 0
    with monkeypatch.context() as patch:
        patch.setattr(module, "SampleWorker", DiesOnce)
        two = draw(npz=str(tmp_path / "two.npz"), workers={"count": 2})
    assert marker.exists()
    assert "the batch of images 3 to 5 goes back to the queue" in capsys.readouterr().err
    assert two.resumed == 0
    assert (tmp_path / "one.npz").read_bytes() == (tmp_path / "two.npz").read_bytes()
    assert sorted(drawn) == [0, 0, 1, 1, 2, 2, 3, 3]

    with np.load(tmp_path / "one.npz") as file:
        images, labels, about = file["arr_0"], file["labels"], json.loads(str(file["about"]))
    assert (images.shape, images.dtype) == ((12, 32, 32, 3), np.uint8)
    assert len({image.tobytes() for image in images}) == 12
    np.testing.assert_array_equal(images, expected[:12])
    assert labels.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1]
    assert about["checkpoint"] == str(run / "checkpoint-000000004")
    described = {"step": 4, "weights": "ema", "model": "SiT-S/2", "num": 12, "image_size": 32}
    assert about.items() >= {**described, "autoencoder": "demo", "labels": "balanced"}.items()
    assert about["sampler"]["guidance_high"] == 0.7
    pictures = sorted((tmp_path / "pictures").glob("*.png"))
    assert [picture.name for picture in pictures] == [f"{n:06d}.png" for n in range(12)]
    for picture, image in zip(pictures, images, strict=True):
        np.testing.assert_array_equal(np.asarray(Image.open(picture)), image)
    marker.unlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.npz", "pictures", "two.npz"]

    drawn.clear()
    pictures[7].unlink()
    again = draw(npz=str(tmp_path / "one.npz"), folder=str(tmp_path / "pictures"))
    assert (again.images, again.resumed, drawn) == (12, 9, [2])
    np.testing.assert_array_equal(np.asarray(Image.open(pictures[7])), images[7])


@pytest.mark.usefixtures("two_cpus")
def test_ended_by_a_signal_and_resumed(
    draw: Sample,
    run: Path,
    tmp_path: Path,
    drawn: list[int],
    expected: np.ndarray[Any, Any],
    capsys: pytest.CaptureFixture,
) -> None:
    """SIGTERM to a command with a cluster of its own; the rest is drawn here."""
    out = tmp_path / "a.npz"
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps(options(run, num=30, npz=str(out))))
    process = subprocess.Popen(
        [sys.executable, *COMMAND, "-c", SLOWED, "--config", str(config), "--json"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    parts = tmp_path / "a.npz.parts"
    try:
        deadline = time.monotonic() + 120
        while len(list(parts.glob("[0-9]*.npy"))) < 2 and time.monotonic() < deadline:
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        output, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 143, errors
    assert output == ""
    assert errors.splitlines()[-1].endswith("run the same command again to continue")
    assert "Traceback" not in errors
    finished = {int(path.stem) // 3 for path in parts.glob("[0-9]*.npy")}
    assert 2 <= len(finished) < 10
    assert not out.exists()

    with pytest.raises(UserError, match=r"a.npz.parts' has other images: labels balanced \(now"):
        draw(num=30, npz=str(out), labels="random")
    assert drawn == []
    assert main(["--config", str(config), "--json"]) == 0
    assert sorted(drawn) == sorted(set(range(10)) - finished)
    text = capsys.readouterr().out
    report = json.loads(text)
    assert text.count("\n") == 1
    assert report.pop("seconds") > 0
    assert report.pop("images_per_second") > 0
    assert report == {
        "images": 30,
        "npz": str(out),
        "folder": None,
        "labels": "balanced",
        "resumed": 3 * len(finished),
    }
    np.testing.assert_array_equal(np.load(out)["arr_0"], expected)


@pytest.fixture
def running(run: Path, tmp_path: Path) -> Path:
    """A run that has reached step 2."""
    shutil.copytree(run, tmp_path / "runs" / "running")
    shutil.move(tmp_path / "runs" / "running" / NEWEST, tmp_path / NEWEST)
    return tmp_path / "runs" / "running"


@pytest.mark.usefixtures("two_cpus")
def test_unfinished_images_of_a_run_that_continues(
    draw: Sample,
    running: Path,
    tmp_path: Path,
    drawn: list[int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    """They are completed with their own checkpoint, while the run has it."""
    outputs = {"npz": str(tmp_path / "a.npz"), "folder": str(tmp_path / "a")}
    again = {**outputs, "checkpoint": str(running)}

    finish = NpzOutput.finish

    def end(*args: Any) -> None:
        raise UserError("the end")

    monkeypatch.setattr(NpzOutput, "finish", end)
    with pytest.raises(UserError, match="the end"):
        draw(**again)
    parts = tmp_path / "a.npz.parts"
    shutil.move(tmp_path / NEWEST, running / NEWEST)
    (parts / "000000003.npy").unlink()
    drawn.clear()
    with pytest.raises(UserError, match="the end"):
        draw(**again)
    assert drawn == [1]
    message = f"resuming '{parts}' with '{running}/checkpoint-000000002'"
    assert message in capsys.readouterr().err

    earlier = running / "checkpoint-000000002"
    shutil.move(earlier, tmp_path / earlier.name)
    with pytest.raises(UserError, match="000002', which the run has deleted since") as error:
        draw(**again)
    assert f"delete '{parts}' to start again with '{NEWEST}'" in str(error.value)
    with pytest.raises(UserError, match=r"has other images: step 2 \(now 4\)"):
        draw(**{**again, "checkpoint": str(running / NEWEST)})
    shutil.move(tmp_path / earlier.name, earlier)

    # all images exist: the file is written without workers
    monkeypatch.setattr(NpzOutput, "finish", finish)
    monkeypatch.setattr(module, "Actors", None)
    monkeypatch.setattr(module, "ray_cluster", None)
    done = draw(**again)
    assert (done.images, done.resumed, done.images_per_second) == (12, 12, 0)
    with np.load(tmp_path / "a.npz") as file:
        assert json.loads(str(file["about"]))["step"] == 2
    assert not parts.exists()
    assert draw(**{**again, "checkpoint": str(earlier)}).resumed == 12
    for change in ({"labels": "random"}, {"weights": "model"}, {"checkpoint": str(running)}):
        with pytest.raises(TypeError, match="NoneType"):  # needs workers
            draw(**{**again, **change})


@pytest.mark.usefixtures("two_cpus")
@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        ({"autoencoder": "/no/such\nfolder"}, "--autoencoder '/no/such"),
        ({"device": "cuda"}, "asks for 1 x 1 GPU; the Ray cluster has 0 GPUs"),
        ({"workers": {"count": 3}}, "--workers.count asks for 3 x 1 CPU; the Ray cluster has 2"),
        ({"checkpoint": "memory://no/run"}, "--checkpoint 'memory://no/run' holds no checkpoint"),
        ({"checkpoint": "memory://no/a.pt"}, "'memory://no/a.pt': there is no such file"),
        ({"checkpoint": "/no/such/run"}, "'/no/such/run' holds no checkpoint"),
        ({"checkpoint": None}, "--checkpoint is missing"),
        ({"npz": "/proc/none/a.npz"}, r"--npz '/proc/none/a.npz' cannot be written \(No such"),
        ({"npz": None, "folder": "/proc/none/a"}, r"'/proc/none/a' cannot be written \("),
    ],
)
def test_bad_requests_are_one_line_and_not_retried(
    draw: Sample,
    tmp_path: Path,
    overrides: dict[str, Any],
    complaint: str,
    capsys: pytest.CaptureFixture,
) -> None:
    with pytest.raises(UserError, match=complaint):
        draw(**{"npz": str(tmp_path / "a.npz"), **overrides})
    assert "queue" not in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        ({"sampler": {"method": "ddpm", "steps": 2}}, "--sampler.method sde, ode or ode_heun"),
        ({"precision": "float16"}, "--precision float16 needs a GPU"),
        ({"model": "SiT-S/2"}, "--model is for a .pt file"),
    ],
)
def test_a_worker_refuses_bad_options(run: Path, overrides: dict[str, Any], complaint: str) -> None:
    config = SampleConfig.model_validate(options(run, **overrides))
    with pytest.raises(UserError, match=complaint) as error:
        SampleWorker().load(config, str(run), "cpu", torch.get_num_threads())
    assert type(error.value) is UserError  # subclasses may not survive pickling


def test_a_diverged_student_draws_no_black_images(run: Path) -> None:
    worker = SampleWorker()
    worker.load(SampleConfig.model_validate(options(run)), str(run), "cpu", torch.get_num_threads())
    with torch.no_grad():
        next(worker.student.parameters()).fill_(torch.nan)
    with pytest.raises(UserError, match="latents of images 3 to 4 are not finite"):
        worker.draw(ImageBatch(1, 3, 2), [0, 1], pngs=False)


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        ([], "give --png FILE for a grid, or --num N with --npz FILE or --folder DIR"),
        (["--num", "9"], "--num needs --npz FILE or --folder DIR"),
        (["--num", "9", "--png", "a.png"], "give one of them"),
        (["--num", "9", "--npz", "a/"], "name a file"),
        (["--num", "9", "--npz", "a.npz", "--per-class", "3"], "--per-class is for --png"),
        (["--png", "a.png", "--npz", "a.npz"], "--npz is for --num"),
        (["--png", "a.png", "--workers.count", "2"], "--workers is for --num"),
        (["--png", "a.png"], "--checkpoint is missing"),
        (
            ["--png", "/proc/none/a.png", "--checkpoint", "/"],
            r"--png '/proc/none/a.png' cannot be written \(No such",
        ),
        (["--png", "a.png", "--classes", "1,2,0-1"], "classes: class 1 is named 2 times"),
        (
            ["--png", "a.jpgg", "--checkpoint", "/"],
            "'.jpgg' is not an image format; use .png",
        ),
        (["--png", "a.psd", "--checkpoint", "/"], "'.psd' is not an image format"),  # read only
        (["--png", "a.png", "--checkpoint", "memory://a/b"], "'memory://a/b' holds no checkpoint"),
    ],
)
def test_unclear_requests(argv: list[str], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        main(argv)


def test_a_grid(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this process, without Ray."""
    monkeypatch.setitem(sys.modules, "pipeline.sampling.job", None)
    argv = ["--checkpoint", str(run), "--autoencoder", "demo", "--sampler.steps", "2"]
    argv += ["--classes", "1,3-4", "--per-class", "2", "--png", str(tmp_path / "a.png")]
    assert main(argv) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'a.png'}\n"
    width, height = Image.open(tmp_path / "a.png").size
    assert height == 3 * 98 + 2
    assert 10 < width - (2 * 98 + 2) < 40  # a digit beside each row
    assert main([*argv, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report.items() >= {"images": 6, "png": str(tmp_path / "a.png")}.items()
    with pytest.raises(UserError, match="class 5; the model has classes 0 to 4"):
        main([*argv, "--classes", "5"])
