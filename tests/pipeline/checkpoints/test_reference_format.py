"""The file format of the SiT, REPA and HASTE repositories, read and written."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from jobs.export import main as export
from jobs.sample import main as draw
from pipeline.checkpoints.local import LocalCheckpoints, latest_checkpoint
from pipeline.checkpoints.reference_format import (
    Parts,
    drop_learned_sigma,
    join_state,
    read_file,
    split_state,
    student_from_file,
)
from pipeline.models import SiT, make_student
from pipeline.models.ema import catch_up
from pipeline.models.projector import Projector
from pipeline.train.loop import train
from schemas.errors import UserError
from schemas.run import RunConfig
from schemas.sample import FileOptions
from schemas.student import SIZES, StudentConfig

CONFIG = StudentConfig(model="SiT-S/2", latent_size=8, num_classes=5)


@pytest.fixture(autouse=True)
def small_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Published names, small networks."""
    monkeypatch.setitem(SIZES, "S", (2, 24, 3))
    monkeypatch.setitem(SIZES, "B", (3, 24, 3))


def random_student(seed: int, config: StudentConfig = CONFIG) -> SiT:
    torch.manual_seed(seed)
    student = make_student(config)
    for parameter in student.parameters():
        nn.init.normal_(parameter, std=0.2)
    return student.requires_grad_(False)


def velocity(student: SiT) -> Tensor:
    torch.manual_seed(0)
    x = torch.randn(2, *student.config.latent_shape)
    with torch.no_grad():
        return student(x, torch.tensor([0.2, 0.7]), torch.tensor([1, 5])).prediction


@pytest.fixture
def checkpoint() -> dict[str, Any]:
    """A checkpoint in the form of HASTE's training script, saved from a model wrapped in DDP."""
    states = {}
    for seed, name in enumerate(("model", "ema")):
        parts = Parts(random_student(seed).state_dict(), Projector(24, 16, 12).state_dict())
        states[name] = join_state(parts)
    states["model"] = {f"module.{name}": tensor for name, tensor in states["model"].items()}
    options = argparse.Namespace(model="SiT-S/2", encoder_depth=8)
    return {**states, "opt": {"state": {}}, "args": options, "steps": 100}


def save(content: Any, folder: Path, **kwargs: Any) -> Path:
    path = folder / "0000100.pt"
    torch.save(content, path, **kwargs)
    return path


@pytest.mark.parametrize(("weights", "seed"), [("model", 0), ("ema", 1)])
def test_model_and_ema_of_a_training_checkpoint(
    checkpoint: dict[str, Any], tmp_path: Path, weights: str, seed: int
) -> None:
    path = save(checkpoint, tmp_path)
    student = student_from_file(path, "SiT-S/2", weights)
    assert student.config == CONFIG
    assert torch.equal(velocity(student), velocity(random_student(seed)))
    assert read_file(path, weights).projector.keys() == Projector(24, 16, 12).state_dict().keys()


@pytest.mark.parametrize("zipped", [True, False])
def test_bare_state_dict(tmp_path: Path, zipped: bool) -> None:
    path = save(random_student(3).state_dict(), tmp_path, _use_new_zipfile_serialization=zipped)
    student = student_from_file(path, "SiT-S/2", options=FileOptions(checkpoint_format="repa"))
    assert torch.equal(velocity(student), velocity(random_student(3)))


def test_sit_s_own_checkpoints_predict_a_sigma_that_is_dropped(tmp_path: Path) -> None:
    wide = random_student(0, CONFIG.model_copy(update={"model": "DiT-S/2"}))  # 2 C outputs
    path = save({"ema": wide.state_dict()}, tmp_path)
    student = student_from_file(path, "SiT-S/2")
    both = velocity(wide)
    assert both.shape[1] == 2 * CONFIG.latent_channels
    torch.testing.assert_close(velocity(student), both[:, : CONFIG.latent_channels])
    kept = drop_learned_sigma(student.state_dict(), CONFIG)
    assert torch.equal(kept["final_layer.linear.weight"], student.final_layer.linear.weight)


def test_dit_keeps_its_sigma(tmp_path: Path) -> None:
    wide = random_student(0, CONFIG.model_copy(update={"model": "DiT-S/2"}))
    path = save(wide.state_dict(), tmp_path)
    assert torch.equal(velocity(student_from_file(path, "DiT-S/2")), velocity(wide))


def test_splitting_and_joining_a_state(checkpoint: dict[str, Any]) -> None:
    state = checkpoint["ema"]
    again = join_state(split_state(state))
    assert list(again) == list(state)
    names = list(again)
    assert names[0] == "pos_embed"
    assert names[-5].startswith("projectors.0.")
    assert names[-4:] == [
        f"final_layer.{part}.{leaf}"
        for part in ("linear", "adaLN_modulation.1")
        for leaf in ("weight", "bias")
    ]


def without(state: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if key != name}


BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "another size": (
        lambda: random_student(0, CONFIG.model_copy(update={"model": "SiT-B/4"})).state_dict(),
        "is not a SiT-S/2: it has 3 blocks of width 24 and patch 4, which is SiT-B/4",
    ),
    "no size": (
        lambda: random_student(0, CONFIG.model_copy(update={"depth": 1})).state_dict(),
        "is not a SiT-S/2: it has 1 blocks of width 24 and patch 2",
    ),
    "a missing weight": (
        lambda: without(random_student(0).state_dict(), "blocks.1.mlp.fc1.bias"),
        "Missing key",
    ),
    "another network": (lambda: nn.Linear(3, 3).state_dict(), "it lacks 'x_embedder.proj.weight'"),
    "an extra weight": (
        lambda: {**random_student(0).state_dict(), "blocks.0.attn.q_norm.weight": torch.ones(8)},
        "Unexpected key",
    ),
    "no ema": (lambda: {"model": random_student(0).state_dict()}, "has no 'ema' weights"),
    "a flat table": (
        lambda: {**random_student(0).state_dict(), "pos_embed": torch.ones(3)},
        "is not a SiT-S/2",
    ),
    "no names": (lambda: {1: torch.ones(3)}, "neither a state dict nor"),
    "no state dict": (lambda: [1, 2], "neither a state dict nor"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_state_that_does_not_fit_is_one_line(tmp_path: Path, case: str) -> None:
    make, message = BAD[case]
    path = save(make(), tmp_path)
    with pytest.raises(UserError) as caught:
        student_from_file(path, "SiT-S/2")
    assert message in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


class Payload:
    """Runs code when unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("executed"),)


def test_code_in_a_file_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = save({"ema": {}, "args": Payload()}, tmp_path)
    with pytest.raises(UserError, match="cannot read it"):
        student_from_file(path, "SiT-S/2")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 cut off"])
def test_damaged_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "damaged.pt"
    path.write_bytes(content)
    with pytest.raises(UserError, match="cannot read it"):
        student_from_file(path, "SiT-S/2")


def test_sampling_from_a_file(tmp_path: Path, checkpoint: dict[str, Any]) -> None:
    path, png = save(checkpoint, tmp_path), tmp_path / "samples.png"
    argv = ["--checkpoint", str(path), "--classes", "0,4", "--per-class", "2", "--png", str(png)]
    argv += ["--sampler.steps", "3", "--autoencoder", "demo", "--device", "cpu"]
    with pytest.raises(UserError, match="add --model"):
        draw(argv)
    assert draw([*argv, "--model", "SiT-S/2"]) == 0
    assert png.stat().st_size > 0
    with pytest.raises(UserError, match="no such file"):
        draw(["--checkpoint", "nowhere.pt", "--model", "SiT-S/2", "--png", str(png)])


@pytest.mark.parametrize("steps", [2, 5])  # before and after the termination at 3
def test_export(run_config: Callable[..., RunConfig], tmp_path: Path, steps: int) -> None:
    config = run_config(steps=steps)
    folder = tmp_path / "run"
    train(config, folder, LocalCheckpoints(folder, keep=1).save)
    out = tmp_path / "exported.pt"
    assert export(["--checkpoint", str(folder), "--out", str(out)]) == 0

    content = torch.load(out, weights_only=True)
    assert list(content) == ["model", "ema", "opt", "args", "steps"]
    assert content["steps"] == steps
    newest = latest_checkpoint(folder)
    assert newest is not None
    projector_now = load_file(newest / "projector.safetensors")
    for name in ("model", "ema"):
        student, projector, _ = read_file(out, name)
        for part, file in ((student, name), (projector, name.replace("model", "projector"))):
            file = "projector_ema" if part is projector and name == "ema" else file
            expected = load_file(newest / f"{file}.safetensors")
            if file == "projector_ema":  # kept as of the termination, exported as of now
                expected = catch_up(expected, projector_now, config.ema_decay, max(0, steps - 3))
            assert part.keys() == expected.keys()
            assert all(torch.equal(part[key], expected[key]) for key in part)

    # as the authors' scripts resume: AdamW over all parameters in their order
    parameters = [nn.Parameter(tensor) for tensor in content["model"].values()]
    optimizer = torch.optim.AdamW(parameters)
    optimizer.load_state_dict(content["opt"])
    names = list(content["model"])
    with_state = {
        name
        for name, parameter in zip(names, parameters, strict=True)
        if "exp_avg" in optimizer.state.get(parameter, {})
    }
    projector_names = {name for name in names if name.startswith("projectors.")}
    terminated = steps > 3
    assert with_state == set(names) - {"pos_embed"} - (projector_names if terminated else set())
    for name, parameter in zip(names, parameters, strict=True):
        if name in with_state:
            assert optimizer.state[parameter]["exp_avg"].shape == parameter.shape
    ours = torch.load(newest / "optimizer.pt", weights_only=True)
    first = names.index("x_embedder.proj.weight")
    moment = content["opt"]["state"][first]["exp_avg"]
    assert torch.equal(moment, ours["state"][0]["exp_avg"])


def test_export_without_feature_loss_has_no_projector(
    run_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    folder, out = tmp_path / "run", tmp_path / "exported.pt"
    config = run_config(steps=1, alignment={"feature_weight": 0})
    train(config, folder, LocalCheckpoints(folder, keep=1).save)
    export(["--checkpoint", str(folder), "--out", str(out)])
    assert read_file(out).projector == {}


def test_export_without_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no checkpoint"):
        export(["--checkpoint", str(tmp_path), "--out", str(tmp_path / "a.pt")])
    with pytest.raises(UserError, match="--out is missing"):
        export(["--checkpoint", str(tmp_path)])
    with pytest.raises(UserError, match="--checkpoint is missing"):
        export(["--out", str(tmp_path / "a.pt")])
    with pytest.raises(UserError, match="not a URL"):
        export(["--checkpoint", str(tmp_path), "--out", "s3://bucket/a.pt"])
    (tmp_path / "b.pt").touch()
    with pytest.raises(UserError, match=r"is already a \.pt file"):
        export(["--checkpoint", str(tmp_path / "b.pt"), "--out", str(tmp_path / "a.pt")])
    assert [path.name for path in tmp_path.iterdir()] == ["b.pt"]
