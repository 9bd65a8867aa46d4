"""Files of other repositories, drawn as their own repository draws them, or refused.

The right latents are integrated here in the notation of SiT's repository: noise at time 0, data at
time 1, score and drift from alpha, sigma and their derivatives.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import Attention as TimmAttention
from torch import Tensor, nn

from pipeline.checkpoints.reference_format import student_from_file
from pipeline.checkpoints.student import load_trained_student
from pipeline.models import SiT, make_student
from pipeline.models.layers import Attention
from pipeline.randomness import Purpose, generator
from pipeline.sampling.generate import draw_latents
from schemas.diffusion import SamplerConfig
from schemas.errors import UserError
from schemas.sample import FileOptions
from schemas.student import SIZES, StudentConfig

CONFIG = StudentConfig(model="SiT-S/2", latent_size=8, num_classes=5)
State = dict[str, Tensor]
STEPS = 6
LABELS = [4, 0]


@pytest.fixture(autouse=True)
def small_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Published names, small networks."""
    monkeypatch.setitem(SIZES, "S", (3, 24, 3))


def random_state(config: StudentConfig = CONFIG, **variant: Any) -> State:
    student = make_student(config, **variant)
    torch.manual_seed(1)
    for parameter in student.parameters():
        nn.init.normal_(parameter, std=0.2)
    return student.state_dict()


def network(state: State, config: StudentConfig = CONFIG, **variant: Any) -> SiT:
    """The network of a state dict of this project."""
    student = make_student(config, **variant)
    student.load_state_dict(state)
    return student.requires_grad_(False).eval()


def with_sigma(state: State) -> State:
    """The state with a ``learn_sigma`` half, whose numbers must not matter."""
    wide = dict(state)
    for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
        own = state[name].unflatten(0, (2, 2, 4))  # rows and columns of a patch, channels
        wide[name] = torch.cat([own, torch.randn(own.shape)], dim=2).flatten(0, 2)
    return wide


def with_projectors(state: State, *widths: int) -> State:
    projectors = {
        f"projectors.{number}.{layer}.{leaf}": torch.randn(shape)
        for number, width in enumerate(widths)
        for layer, rows, columns in ((0, 16, 24), (2, 16, 16), (4, width, 16))
        for leaf, shape in (("weight", (rows, columns)), ("bias", (rows,)))
    }
    return {**state, **projectors}


def save(folder: Path, state: State, args: Any = None) -> Path:
    """A file of SiT's or REPA's training script, or one of weights alone."""
    path = folder / "0400000.pt"
    content = {"model": {}, "ema": state, "opt": {}, "args": args, "steps": 400_000}
    torch.save(state if args is None else content, path)
    return path


def sit_args(**values: Any) -> argparse.Namespace:
    """The options of SiT's train.py that concern the model."""
    options = {"model": "SiT-S/2", "image_size": 256, "num_classes": 5, "path_type": "Linear"}
    options |= {"prediction": "velocity", "loss_weight": None, "train_eps": None}
    return argparse.Namespace(**{**options, "sample_eps": None, "cfg_scale": 4.0, **values})


def repa_args(**values: Any) -> argparse.Namespace:
    """The options of REPA's and HASTE's train.py that concern the model."""
    options = {"model": "SiT-S/2", "num_classes": 5, "encoder_depth": 2, "fused_attn": True}
    options |= {"qk_norm": False, "resolution": 256, "path_type": "linear", "prediction": "v"}
    options |= {"cfg_prob": 0.1, "enc_type": "dinov2-vit-b", "weighting": "uniform"}
    return argparse.Namespace(**{**options, "legacy": False, **values})


def normals(count: int, draw: int) -> Tensor:
    """The noise that the sampler draws: of its start (0), of its steps (1, ...)."""
    numbers = [
        generator(Purpose.SAMPLING, 0, i, draw).standard_normal((4, 8, 8), dtype=np.float32)
        for i in range(count)
    ]
    return torch.from_numpy(np.stack(numbers)).double()


def coefficients(path: str, s: float) -> tuple[float, float, float, float]:
    """Alpha, sigma and their derivatives by SiT's time."""
    if path == "linear":
        return s, 1 - s, 1.0, -1.0
    half = math.pi / 2
    return (
        math.sin(half * s),
        math.cos(half * s),
        half * math.cos(half * s),
        -half * math.sin(half * s),
    )


def integrate(
    student: SiT, path: str, prediction: str, *, repa: bool, method: str, guidance: float
) -> Tensor:
    """Euler steps of SiT's ODE, or Euler-Maruyama with the diffusion 1 - s and a last step of 0.04
    without noise, in SiT's time s."""

    def score_and_drift(x: Tensor, s: float) -> tuple[Tensor, Tensor]:
        time = torch.full((len(x),), 1 - s if repa else s)
        labels = torch.tensor(LABELS)
        output = student(x.float(), time, labels).prediction.double()
        if guidance != 1:
            null = student(x.float(), time, torch.full_like(labels, 5)).prediction.double()
            output = null + guidance * (output - null)
        alpha, sigma, d_alpha, d_sigma = coefficients(path, s)
        if prediction == "velocity":
            drift = -output if repa else output
            ratio = alpha / d_alpha
            return (ratio * drift - x) / (sigma**2 - ratio * d_sigma * sigma), drift
        score = output if prediction == "score" else -output / sigma
        ratio = d_alpha / alpha
        return score, ratio * x + (sigma**2 * ratio - sigma * d_sigma) * score

    edge = 0.0 if prediction == "velocity" else 1e-3
    x = normals(len(LABELS), 0)
    if method == "ode":
        times = np.linspace(edge, 1 - edge, STEPS + 1)
        for s, after in pairwise(times):
            x = x + (after - s) * score_and_drift(x, s)[1]
        return x
    times = [*np.linspace(edge, 0.96, STEPS), 1.0]
    for i in range(STEPS):
        step = times[i + 1] - times[i]
        score, drift = score_and_drift(x, times[i])
        x = x + step * (drift + (1 - times[i]) * score)
        if i < STEPS - 1:
            x = x + math.sqrt(2 * (1 - times[i]) * step) * normals(len(LABELS), i + 1)
    return x


FILES: dict[str, tuple[Callable[[State], State], Any, str, str, bool]] = {
    "SiT's published file": (with_sigma, None, "linear", "velocity", False),
    "SiT": (with_sigma, sit_args(), "linear", "velocity", False),
    "SiT without variance": (dict, sit_args(), "linear", "velocity", False),
    "SiT's GVP": (with_sigma, sit_args(path_type="GVP"), "cosine", "velocity", False),
    "SiT's noise": (with_sigma, sit_args(prediction="noise"), "linear", "noise", False),
    "SiT's score": (with_sigma, sit_args(prediction="score"), "linear", "score", False),
    "SiT's noise on GVP": (
        dict,
        sit_args(prediction="noise", path_type="GVP"),
        "cosine",
        "noise",
        False,
    ),
    "SiT's score on GVP": (
        with_sigma,
        vars(sit_args(prediction="score", path_type="GVP")),
        "cosine",
        "score",
        False,
    ),
    "REPA": (lambda state: with_projectors(state, 8), repa_args(), "linear", "velocity", True),
    "REPA, cosine": (dict, repa_args(path_type="cosine"), "cosine", "velocity", True),
    "REPA's published file": (
        lambda state: with_projectors(state, 8),
        None,
        "linear",
        "velocity",
        True,
    ),
    "REPA with three teachers": (
        lambda state: with_projectors(state, 8, 12, 4),
        repa_args(),
        "linear",
        "velocity",
        True,
    ),
}


@pytest.mark.parametrize(("method", "guidance"), [("ode", 1.0), ("sde", 1.5)])
@pytest.mark.parametrize("file", FILES)
def test_a_file_is_drawn_as_its_repository_draws_it(
    tmp_path: Path, file: str, method: str, guidance: float
) -> None:
    change, args, path, prediction, repa = FILES[file]
    state = random_state()
    student = load_trained_student(save(tmp_path, change(state), args), model="SiT-S/2").student
    assert student.config == CONFIG
    sampler = SamplerConfig.model_validate(
        {"method": method, "steps": STEPS, "guidance": guidance, "guidance_low": 0}
    )
    latents = draw_latents(student, LABELS, sampler)
    right = integrate(network(state), path, prediction, repa=repa, method=method, guidance=guidance)
    assert (latents - right).abs().max() < 1e-4 * right.abs().max()


@pytest.mark.parametrize("prediction", ["velocity", "noise", "score"])
@pytest.mark.parametrize("form", ["sit", "repa"])
def test_weights_alone_are_drawn_as_the_options_say(
    tmp_path: Path, form: str, prediction: str
) -> None:
    state = random_state()
    options = FileOptions.model_validate(
        {"checkpoint_format": form, "path_type": "cosine", "prediction": prediction}
    )
    path = save(tmp_path, state)
    if form == "sit":  # another kind of file
        path = tmp_path / "weights.safetensors"
        save_file(state, path)
    student = student_from_file(path, "SiT-S/2", options=options).eval()
    latents = draw_latents(student, LABELS, SamplerConfig(method="ode", steps=STEPS))
    arguments = {"repa": form == "repa", "method": "ode", "guidance": 1.0}
    right = integrate(network(state), "cosine", prediction, **arguments)
    assert (latents - right).abs().max() < 1e-4 * right.abs().max()


def same_outputs(one: SiT, other: SiT, labels: list[int]) -> bool:
    torch.manual_seed(0)
    x, t = torch.randn(len(labels), 4, 8, 8), torch.linspace(0.1, 0.9, len(labels))
    return torch.equal(
        *(student.eval()(x, t, torch.tensor(labels)).prediction for student in (one, other))
    )


@pytest.mark.parametrize("last", ["args", "option"])
def test_a_label_table_without_null_row(tmp_path: Path, last: str) -> None:
    """The last class is drawn; guidance, which needs the null row, is refused."""
    state = random_state(null_row=False)
    args = repa_args(cfg_prob=0.0)
    options = FileOptions()
    if last == "option":
        args.num_classes = None
        options = FileOptions(num_classes=5)
    path = save(tmp_path, state, args)
    student = load_trained_student(path, model="SiT-S/2", options=options).student
    assert student.config.num_classes == 5
    assert same_outputs(student, network(state, null_row=False), [4, 0])
    drawn = draw_latents(student, [4], SamplerConfig(method="ode", steps=2))
    assert drawn.isfinite().all()
    for sampler in (SamplerConfig(guidance=3, steps=2), SamplerConfig(guidance=1.1, method="ode")):
        with pytest.raises(UserError, match=r"--sampler.guidance .* needs a student"):
            draw_latents(student, [4], sampler)


def test_names_of_early_repa_files_and_of_ddp(tmp_path: Path) -> None:
    """``load_legacy_checkpoints`` of REPA adds ``encoder_depth`` to the numbers."""
    state, legacy = random_state(), {}
    for name, tensor in state.items():
        parts = name.split(".")
        if parts[0] == "blocks" and int(parts[1]) >= 2:
            name = ".".join(["decoder_blocks", str(int(parts[1]) - 2), *parts[2:]])
        legacy[f"module.{name}"] = tensor
    assert any("decoder_blocks.0." in name for name in legacy)
    student = student_from_file(save(tmp_path, legacy, repa_args()), "SiT-S/2")
    assert same_outputs(student, network(state), LABELS)


def test_norms_of_queries_and_keys(tmp_path: Path) -> None:
    """REPA's ``--qk-norm`` is timm's, before the scaling."""
    ours, theirs = (
        Attention(24, 3, qk_norm=True),
        TimmAttention(24, 3, qkv_bias=True, qk_norm=True, norm_layer=nn.LayerNorm),
    )
    torch.manual_seed(0)
    for parameter in ours.parameters():
        nn.init.normal_(parameter)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 16, 24)
    torch.testing.assert_close(ours(x)[0], theirs(x))

    state = random_state(qk_norm=True)
    student = student_from_file(save(tmp_path, state, repa_args(qk_norm=True)), "SiT-S/2")
    assert same_outputs(student, network(state, qk_norm=True), LABELS)


def changed(change: Callable[[State], Any]) -> Callable[[State], State]:
    def apply(state: State) -> State:
        state = dict(state)
        change(state)
        return state

    return apply


def added(name: str, *shape: int) -> Callable[[State], State]:
    return changed(lambda state: state.update({name: torch.zeros(shape)}))


def rows(count: int) -> Callable[[State], State]:
    name = "y_embedder.embedding_table.weight"
    return changed(lambda state: state.update({name: state[name][:1].repeat(count, 1)}))


Refusal = tuple[Callable[[State], State], Any, dict[str, Any], str]
REFUSED: dict[str, Refusal] = {
    "nothing says the direction": (dict, None, {}, "nothing in it says: is data at time 1"),
    "args that say nothing": (dict, argparse.Namespace(seed=1), {}, "--checkpoint-format sit"),
    "REPA's path and SiT's prediction": (
        dict,
        argparse.Namespace(path_type="linear", prediction="noise"),
        {},
        "of path_type linear, prediction noise, some are SiT's and some REPA's",
    ),
    "REPA's args, SiT's variance": (with_sigma, repa_args(), {}, "learn_sigma half, some are"),
    "VP": (dict, sit_args(path_type="VP"), {}, "path_type 'VP'; only Linear, GVP, linear, cosine"),
    "EDM": (dict, repa_args(path_type="edm"), {}, "path_type 'edm'"),
    "data": (dict, repa_args(prediction="x"), {}, "prediction 'x'; only velocity, noise, score, v"),
    "another model": (dict, sit_args(model="SiT-B/2"), {}, "its args say model SiT-B/2"),
    "DiT's args": (with_sigma, argparse.Namespace(model="DiT-S/2"), {}, "model DiT-S/2"),
    "more classes than rows": (dict, repa_args(num_classes=7), {}, "has 6 rows, for 7 classes"),
    "fewer classes than rows": (dict, repa_args(num_classes=4), {}, "has 6 rows, for 4 classes"),
    "the same weight twice": (
        changed(lambda state: state.update({"module.pos_embed": state["pos_embed"]})),
        repa_args(),
        {},
        "two of its weights have the name pos_embed",
    ),
    "a number in words": (dict, repa_args(num_classes="5"), {}, "num_classes '5'"),
    "one row": (rows(1), None, {}, "has 1 rows, for 0 classes"),
    "no norms": (dict, repa_args(qk_norm=True), {}, "say qk_norm, and its blocks have no norms"),
    "RMS norms": (
        changed(
            lambda state: state.update(
                {f"blocks.{n}.attn.{k}_norm.weight": torch.ones(8) for n in range(3) for k in "qk"}
            )
        ),
        repa_args(),
        {},
        "Unexpected key",
    ),
    "MM-DiT": (
        added("joint_blocks.0.x_block.attn.qkv.weight", 4),
        None,
        {},
        r"--model MMDiT-24\): joint",
    ),
    "REPA-E": (added("bn.running_mean", 4), repa_args(), {}, r"\(REPA-E\): bn.running_mean"),
    "LightningDiT": (added("feat_rope.freqs_cos", 4), None, {}, r"rotary .*: feat_rope.freqs_cos"),
    "SwiGLU": (added("blocks.0.mlp.w12.weight", 4), None, {}, "SwiGLU .*: blocks.0.mlp.w12.weight"),
    "RMS norm": (added("blocks.2.norm1.weight", 24), None, {}, "norms with .*: blocks.2.norm1"),
    "a third half": (
        changed(lambda state: state.update({"final_layer.linear.weight": torch.zeros(48, 24)})),
        sit_args(),
        {},
        "has 48 outputs, for 4 channels and patch 2",
    ),
    "a class token's position": (
        changed(lambda state: state.update(pos_embed=torch.zeros(1, 17, 24))),
        repa_args(),
        {},
        "its 17 positions are not a square",
    ),
    "an option against the file": (
        with_sigma,
        sit_args(),
        {"checkpoint_format": "repa"},
        "--checkpoint-format repa contradicts its path_type Linear, prediction velocity, learn",
    ),
    "a path against the file": (
        dict,
        repa_args(path_type="cosine"),
        {"path_type": "linear"},
        "say path_type cosine, --path-type says linear",
    ),
    "a prediction against the file": (
        dict,
        sit_args(),
        {"prediction": "noise"},
        "say prediction velocity, --prediction says noise",
    ),
    "classes against the file": (dict, repa_args(), {"num_classes": 6}, "--num-classes says 6"),
    "classes against the table": (
        dict,
        None,
        {"num_classes": 4, "checkpoint_format": "sit"},
        "has 6 rows, for 4 classes",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_drawn_is_one_line_that_names_it(tmp_path: Path, case: str) -> None:
    change, args, options, message = REFUSED[case]
    path = save(tmp_path, change(random_state()), args)
    with pytest.raises(UserError, match=message) as caught:
        student_from_file(path, "SiT-S/2", options=FileOptions.model_validate(options))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


DIT_REFUSED: dict[str, Refusal] = {
    "no variance": (dict, None, {}, "no outputs for the variance"),
    "SiT's args": (with_sigma, sit_args(model=None), {}, "path_type 'Linear', an option of SiT"),
    "an option": (with_sigma, None, {"checkpoint_format": "sit"}, "--checkpoint-format is for SiT"),
}


@pytest.mark.parametrize("case", DIT_REFUSED)
def test_files_that_are_not_of_dit(tmp_path: Path, case: str) -> None:
    change, args, options, message = DIT_REFUSED[case]
    path = save(tmp_path, change(random_state()), args)
    with pytest.raises(UserError, match=message):
        student_from_file(path, "DiT-S/2", options=FileOptions.model_validate(options))


class Foreign:
    """An object like those that training scripts leave in ``args``; notes that it was unpickled."""

    made: ClassVar[list[str]] = []

    def __setstate__(self, state: Any) -> None:
        self.made.append("foreign")


@pytest.mark.parametrize("zipped", [True, False])
def test_a_foreign_class_is_named_and_not_run(tmp_path: Path, zipped: bool) -> None:
    args = repa_args(config=Foreign())
    args.config.value = 1
    path = tmp_path / "a.pt"
    torch.save({"ema": random_state(), "args": args}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError) as caught:
        student_from_file(path, "SiT-S/2")
    message = str(caught.value)
    assert f"it holds a {__name__}.Foreign: no code is run" in message
    assert message.isprintable()
    assert "weights_only" not in message
    assert Foreign.made == []
