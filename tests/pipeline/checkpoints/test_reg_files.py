"""Files of REG's repository: image and class token are drawn together, or the file is refused.

The right latents are integrated here from REG's formulas, with one batch for both halves of the
guidance.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pipeline.checkpoints.reference_format import student_from_file
from pipeline.models import SiT, make_student
from pipeline.randomness import Purpose, generator
from pipeline.sampling.generate import draw_images, draw_latents
from schemas.diffusion import SamplerConfig
from schemas.errors import UserError
from schemas.student import SIZES, StudentConfig

CONFIG = StudentConfig(model="SiT-S/2", latent_size=8, num_classes=5, class_token=20)
LABELS = [4, 0, 2]
STEPS = 5
State = dict[str, Tensor]


@pytest.fixture(autouse=True)
def small_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Published names, small networks."""
    monkeypatch.setitem(SIZES, "S", (3, 24, 3))


def state_of_reg(config: StudentConfig = CONFIG) -> State:
    """Weights in the order of REG's file, with its projector; 1 + 16 rows of positions."""
    torch.manual_seed(1)
    student = make_student(config)
    for parameter in student.parameters():
        nn.init.normal_(parameter, std=0.3)
    state = student.state_dict()
    for layer, rows, columns in ((0, 16, 24), (2, 16, 16), (4, 20, 16)):
        state[f"projectors.0.{layer}.weight"] = torch.randn(rows, columns)
        state[f"projectors.0.{layer}.bias"] = torch.randn(rows)
    return state


def reg_args(**values: Any) -> argparse.Namespace:
    """The options of REG's train.py that concern the model."""
    options = {"model": "SiT-S/2", "num_classes": 5, "encoder_depth": 2, "fused_attn": True}
    options |= {"qk_norm": False, "ops_head": 16, "resolution": 256, "path_type": "linear"}
    options |= {"prediction": "v", "cfg_prob": 0.1, "enc_type": "dinov2-vit-b", "cls": 0.03}
    return argparse.Namespace(**{**options, "proj_coeff": 0.5, "legacy": False, **values})


def save(folder: Path, state: State, args: Any = None) -> Path:
    """A file of REG's training script, or one of weights alone."""
    path = folder / "0400000.pt"
    content = {"model": {}, "ema": state, "opt": {}, "args": args, "steps": 400_000}
    torch.save(state if args is None else content, path)
    return path


def normals(draw: int, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Noise of images and class tokens: of the start (0), of the steps (1, ...)."""
    images, tokens = [], []
    for i in range(len(LABELS)):
        rng = generator(Purpose.SAMPLING, 0, i, draw)
        images.append(rng.standard_normal(shape, dtype=np.float32))
        tokens.append(rng.standard_normal(20, dtype=np.float32))
    return torch.from_numpy(np.stack(images)).double(), torch.from_numpy(np.stack(tokens)).double()


@torch.no_grad()
def integrate(student: SiT, method: str, guidance: float, of_class: float, high: float) -> Tensor:
    """Images of REG's sampler on a linear path (score = -((1 - t) v + x) / t), or of Euler's
    method."""
    x, c = normals(0, (4, 8, 8))
    labels = torch.tensor(LABELS)
    times = torch.linspace(1, 0, STEPS + 1, dtype=torch.float64)
    if method == "sde":
        times = torch.cat([torch.linspace(1, 0.04, STEPS, dtype=torch.float64), torch.zeros(1)])
    for step, (now, after) in enumerate(pairwise(times.double())):
        drifts = []
        for label in (labels, torch.full_like(labels, 5)):
            time = torch.full((len(labels),), float(now))
            out = student(x.float(), time, label, class_token_BE=c.float())
            for state, v in ((x, out.prediction.double()), (c, out.class_prediction.double())):
                score = -((1 - now) * v + state) / now
                drifts.append(v - now * score if method == "sde" else v)
        image, token, image_null, token_null = drifts
        if guidance > 1 and now <= high:
            image = image_null + guidance * (image - image_null)
            token = token_null + of_class * (token - token_null) if of_class > 0 else token
        x, c = x + (after - now) * image, c + (after - now) * token
        if method == "sde" and step < STEPS - 1:
            scale = (2 * now * (now - after)).sqrt()
            noise, noise_of_class = normals(step + 1, (4, 8, 8))
            x, c = x + scale * noise, c + scale * noise_of_class
    return x.float()


@pytest.mark.parametrize("of_class", [None, 1.5, 0.0])
@pytest.mark.parametrize("method", ["sde", "ode"])
def test_a_file_is_drawn_with_its_class_token(
    tmp_path: Path, method: str, of_class: float | None
) -> None:
    path = save(tmp_path, state_of_reg(), reg_args())
    student = student_from_file(path, "SiT-S/2").eval()
    assert (student.config.class_token, student.null_label) == (20, 5)
    sampler = SamplerConfig(
        method=method, steps=STEPS, guidance=2.3, guidance_high=0.85, class_guidance=of_class
    )
    right = integrate(student, method, 2.3, 2.3 if of_class is None else of_class, 0.85)
    assert torch.allclose(draw_latents(student, LABELS, sampler), right, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["sde", "ode", "ode_heun"])
def test_an_image_depends_on_its_number_and_label_alone(method: str) -> None:
    student = network()
    sampler = SamplerConfig(method=method, steps=3, guidance=1.5, class_guidance=0.7)
    together = draw_latents(student, LABELS, sampler)
    for number, label in enumerate(LABELS):
        alone = draw_latents(student, [label], sampler, first_index=number)
        assert torch.allclose(together[number], alone[0], rtol=1e-3, atol=1e-3)


def test_guidance_of_the_class_token_changes_the_image_only_inside_the_interval() -> None:
    student = network()

    def latents(**options: float) -> Tensor:
        return draw_latents(student, LABELS, SamplerConfig(steps=4, **options))

    guided = latents(guidance=2.0)
    assert torch.equal(guided, latents(guidance=2.0, class_guidance=2.0))
    assert not torch.equal(guided, latents(guidance=2.0, class_guidance=0.0))
    assert torch.equal(latents(), latents(class_guidance=3.0))
    early = {"guidance": 2.0, "guidance_low": 1.0}  # the first step alone
    assert not torch.equal(latents(**early), latents(**early, class_guidance=3.0))
    assert torch.equal(latents(), latents(guidance=2.0, guidance_high=0.01, class_guidance=3.0))


def network() -> SiT:
    student = make_student(CONFIG)
    state = {k: v for k, v in state_of_reg().items() if not k.startswith("projectors.")}
    student.load_state_dict(state)
    return student.requires_grad_(False).eval()


def test_weights_alone_are_read_with_their_wrappers(tmp_path: Path) -> None:
    """REG's file says the time of data by its class token, where nothing else does."""
    state = {name: t for name, t in state_of_reg().items() if not name.startswith("projectors.")}
    path = save(tmp_path, {f"module.{name}": tensor for name, tensor in state.items()})
    student = student_from_file(path, "SiT-S/2")
    assert student.convention.data_time == 0
    assert student.config == CONFIG
    assert all(torch.equal(state[name], t) for name, t in student.state_dict().items())


def without(name: str) -> Callable[[State], State]:
    return lambda state: {key: tensor for key, tensor in state.items() if key != name}


def changed(**tensors: Tensor) -> Callable[[State], State]:
    return lambda state: {**state, **{k.replace("__", "."): t for k, t in tensors.items()}}


REFUSED: dict[str, tuple[Callable[[State], State], str]] = {
    "no entry": (without("cls_projectors2.weight"), "it lacks 'cls_projectors2.weight'"),
    "no norm": (without("wg_norm.bias"), "it lacks 'wg_norm.bias'"),
    "no head": (without("final_layer.linear_cls.weight"), "it lacks 'final_layer.linear_cls.w"),
    "another head": (
        changed(final_layer__linear_cls__weight=torch.zeros(21, 24)),
        "size mismatch for final_layer.linear_cls.weight",
    ),
    "another norm": (changed(wg_norm__weight=torch.zeros(20)), "size mismatch for wg_norm.weight"),
    "another entry": (changed(cls_projectors2__bias=torch.zeros(20)), "mismatch for cls_proj"),
    "a vector for an entry": (changed(cls_projectors2__weight=torch.zeros(20)), "out of range"),
    "no row for the class token": (
        changed(pos_embed=torch.zeros(1, 16, 24)),
        "its 15 positions beside the class token's are not a square",
    ),
    "other positions": (changed(pos_embed=torch.zeros(1, 19, 24)), "its 18 positions beside"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_file_that_contradicts_itself_is_refused(tmp_path: Path, case: str) -> None:
    change, message = REFUSED[case]
    path = save(tmp_path, change(state_of_reg()), reg_args())
    with pytest.raises(UserError, match=message) as refusal:
        student_from_file(path, "SiT-S/2")
    assert "\n" not in str(refusal.value)


def test_a_dit_has_no_class_token(tmp_path: Path) -> None:
    path = save(tmp_path, state_of_reg(), argparse.Namespace(num_classes=5))
    with pytest.raises(UserError, match="DiT-S/2 cannot denoise a class token"):
        student_from_file(path, "DiT-S/2")


def test_a_student_without_a_class_token_refuses_its_guidance() -> None:
    plain = make_student(CONFIG.model_copy(update={"class_token": None}))
    sampler = SamplerConfig(steps=2, guidance=2.0, class_guidance=1.0)
    with pytest.raises(UserError, match=r"--sampler.class-guidance is for a student that denoises"):
        draw_images(plain, None, [0], sampler)  # type: ignore[arg-type]


def test_equal_samplers_are_recognised() -> None:
    own = SamplerConfig(guidance=2.0, class_guidance=2.0)
    assert own.in_force == SamplerConfig(guidance=2.0)
    assert SamplerConfig(class_guidance=3.0).in_force == SamplerConfig()
    assert SamplerConfig(guidance=2.0, class_guidance=0.0).in_force.class_guidance == 0
    assert "class_guidance" not in SamplerConfig().model_dump()
    assert own.model_dump()["class_guidance"] == 2
