"""Exported files: drawn as their runs are, bit for bit."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from jobs.export import main as export
from jobs.sample import main as draw
from pipeline.checkpoints.local import LocalCheckpoints
from pipeline.checkpoints.reference_format import read_file
from pipeline.checkpoints.state import CheckpointContents
from pipeline.checkpoints.student import load_trained_student
from pipeline.sampling.batches import ImageBatch
from pipeline.sampling.job import describe_images
from pipeline.sampling.outputs import are_same_images
from pipeline.sampling.worker import SampleWorker
from pipeline.train.loop import train
from schemas.errors import UserError
from schemas.run import RunConfig
from schemas.sample import FileOptions, SampleConfig
from schemas.student import SIZES

RunConfigs = Callable[..., RunConfig]
KINDS: dict[str, dict[str, Any]] = {
    "linear": {},
    "cosine": {"diffusion": {"path": "cosine"}},
    "no drops": {"diffusion": {"path": "cosine", "label_drop": 0}},
    "DiT": {"student": {"model": "DiT-S/2"}},
}


def make_run(run_config: RunConfigs, folder: Path, *, bad: str = "", **overrides: Any) -> Path:
    """A run of one step, with random weights in its checkpoint: those of a trained one are small.
    One weight of the module ``bad`` is not a number."""
    config = run_config(steps=1, **overrides)

    def save(step: int, contents: CheckpointContents) -> None:
        weights = {}
        for module, state in contents.weights.items():
            torch.manual_seed(0)
            weights[module] = {name: torch.randn(w.shape) * 0.2 for name, w in state.items()}
            weights[module] |= {k: v for k, v in state.items() if k == "pos_embed"}
        if bad:
            next(reversed(weights[bad].values())).view(-1)[1] = torch.nan
        LocalCheckpoints(folder, keep=1).save(step, dataclasses.replace(contents, weights=weights))

    train(config, folder, save)
    return folder


def picture(checkpoint: Path, *options: str) -> Any:
    """Pixels of a grid of classes 0 and 4."""
    png = checkpoint.parent / "grid.png"
    argv = ["--checkpoint", str(checkpoint), "--png", str(png), "--classes", "0,4"]
    argv += ["--per-class", "1", "--sampler.steps", "4", "--autoencoder", "demo"]
    assert draw([*argv, "--device", "cpu", *options]) == 0
    return np.asarray(Image.open(png))


@pytest.mark.parametrize("kind", KINDS)
def test_an_export_gives_the_pictures_of_its_run(
    run_config: RunConfigs, tmp_path: Path, kind: str
) -> None:
    run, out = make_run(run_config, tmp_path / "run", **KINDS[kind]), tmp_path / "run.pt"
    assert export(["--checkpoint", str(run), "--out", str(out)]) == 0
    methods = ["ddpm"] if kind == "DiT" else ["sde", "ode"]
    guidance = "1.0" if kind == "no drops" else "1.5"
    name = "DiT-S/2" if kind == "DiT" else "SiT-S/2"
    for method in methods:
        sampler = ["--sampler.method", method, "--sampler.guidance", guidance]
        right = picture(run, *sampler)
        assert np.array_equal(picture(out, *sampler), right)
    assert np.array_equal(picture(out, *sampler, "--model", name), right)
    one, other = load_trained_student(run), load_trained_student(out)
    assert (other.student.config, other.encoder) == (one.student.config, one.encoder)
    assert other.student.config.depth == 4  # no published size

    if kind == "no drops":
        for checkpoint in (run, out):
            with pytest.raises(UserError, match=r"--sampler.guidance 2 needs a student that was"):
                picture(checkpoint, "--sampler.guidance", "2")
    with pytest.raises(UserError, match=rf"is not a SiT-B/2: its args say {name}"):
        picture(out, "--model", "SiT-B/2")
    with pytest.raises(UserError, match=r"--path-type is for files that do not say it"):
        picture(out, "--path-type", "cosine")
    with pytest.raises(UserError, match=r"--checkpoint-format is for a .pt file"):
        picture(run, "--checkpoint-format", "sit")


def test_the_path_of_an_earlier_export_is_read(run_config: RunConfigs, tmp_path: Path) -> None:
    """It has no autoencoder; the path was always there and was not read."""
    run = make_run(run_config, tmp_path / "run", **KINDS["cosine"])
    export(["--checkpoint", str(run), "--out", str(tmp_path / "new.pt")])
    content = torch.load(tmp_path / "new.pt", weights_only=True)
    del content["args"]["autoencoder"]
    torch.save(content, tmp_path / "old.pt")
    right = picture(run)
    assert np.array_equal(picture(tmp_path / "old.pt"), right)
    content["args"]["diffusion"]["path"] = "linear"
    torch.save(content, tmp_path / "linear.pt")
    assert not np.array_equal(picture(tmp_path / "linear.pt"), right)
    content["args"]["student"]["new_option"] = 1
    torch.save(content, tmp_path / "newer.pt")
    with pytest.raises(UserError, match=r"its args are of another version .*new_option"):
        picture(tmp_path / "newer.pt")


def test_workers_draw_a_file_as_the_options_say(
    run_config: RunConfigs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The time of a file of weights alone is among the facts that tell sets of images apart."""
    monkeypatch.setitem(SIZES, "S", (4, 24, 4))
    run = make_run(run_config, tmp_path / "run")
    export(["--checkpoint", str(run), "--out", str(tmp_path / "run.pt")])
    weights = tmp_path / "weights.pt"
    torch.save(read_file(tmp_path / "run.pt").student, weights)
    images, infos = {}, {}
    for form in (None, "repa", "sit"):
        config = SampleConfig(
            num=2,
            model=None if form is None else "SiT-S/2",
            checkpoint_format=form,
            autoencoder="demo",
            sampler={"method": "ode", "steps": 3},
        )
        worker, place = SampleWorker(), str(tmp_path / "run.pt" if form is None else weights)
        info = worker.load(config, place, "cpu", torch.get_num_threads())
        infos[form] = describe_images(config, "a.pt", info)
        images[form] = worker.draw(ImageBatch(0, 0, 2), [4, 1], pngs=False).images
    assert np.array_equal(images[None], images["repa"])
    assert not np.array_equal(images["sit"], images["repa"])
    assert are_same_images(infos[None], infos["repa"])
    assert not are_same_images(infos["sit"], infos["repa"])
    with pytest.raises(UserError, match="nothing in it says: is data at time 1"):
        load_trained_student(weights, model="SiT-S/2", options=FileOptions())


@pytest.mark.parametrize("module", ["ema", "model", "projector_ema"])
def test_weights_that_are_not_finite_are_refused(
    run_config: RunConfigs, tmp_path: Path, module: str
) -> None:
    run, out = make_run(run_config, tmp_path / "run", bad=module), tmp_path / "run.pt"
    message = r"checkpoint-000000001', {}: 1 of \d+ numbers of {} are not finite"
    name = "projectors.0.4.bias" if module == "projector_ema" else "final_layer.*"
    with pytest.raises(UserError, match=message.format(module.removeprefix("projector_"), name)):
        export(["--checkpoint", str(run), "--out", str(out)])
    assert not out.exists()
    for weights in ("ema", "model"):
        if weights == module:
            pattern = message.format(rf"{weights}.safetensors", "final_layer.*")
            with pytest.raises(UserError, match=pattern):
                picture(run, "--weights", weights)
        else:
            picture(run, "--weights", weights)


def test_a_file_whose_weights_are_not_finite(run_config: RunConfigs, tmp_path: Path) -> None:
    run, out = make_run(run_config, tmp_path / "run"), tmp_path / "run.pt"
    export(["--checkpoint", str(run), "--out", str(out)])
    content = torch.load(out, weights_only=True)
    content["ema"]["blocks.2.mlp.fc1.bias"][3:5] = -torch.inf
    torch.save(content, out)
    with pytest.raises(UserError, match=r"run.pt': 2 of 96 numbers of blocks.2.mlp.fc1.bias are"):
        picture(out)
    picture(out, "--weights", "model")
