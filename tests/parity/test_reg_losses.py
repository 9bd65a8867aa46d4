"""REG's loss terms and gradients: of a batch on the linear path, of each sample on the cosine path,
where the authors' class target is wrong for more than one sample."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.alignment.aligned_student import ClassToken
from pipeline.alignment.losses import Targets
from pipeline.checkpoints.reference_format import Parts, join_state
from pipeline.diffusion.interpolant import interpolate
from schemas.diffusion import Path
from tests.parity.reference import COSINE_FLOOR, Golden, check_number
from tests.parity.reg import make_module

FILE = "reg_loss_io"
TERMS = {"denoise": 0, "proj": 1, "cls": -1}
"""Place of each of the reference's terms in the outputs of our module."""


def kind_of(entry: str) -> Path:
    return "cosine" if entry.startswith("cosine") else "linear"


def sums(recipes: Golden, module: Any, part: slice) -> Tensor:
    """The module's outputs for some samples."""
    io, objective = recipes.tensors(FILE), module.objective
    clean, t = io["cls_clean"][part], io["t"][part]
    noisy, _, target = objective.corrupt(io["latents"][part], io["noise"][part], t)
    noisy_token, _, token_target = objective.corrupt(clean, io["cls_noise"][part], t)
    targets = Targets(io["patch_features"][part], None)
    token = ClassToken(noisy_token, token_target, clean)
    return module(noisy, t, io["labels"][part], target, targets, class_token=token)


def total_of(recipes: Golden, values: Tensor) -> Tensor:
    loss = recipes.configs["reg_loss"]
    return values[0] + loss["proj_coeff"] * values[1] + loss["cls_coeff"] * values[-1]


@pytest.fixture(scope="module")
def run(recipes: Golden) -> SimpleNamespace:
    """The linear path: all terms of the batch, and the gradients of the total."""
    module = make_module(recipes)
    losses = sums(recipes, module, slice(None)) / recipes.configs["reg_loss"]["batch"]
    total = total_of(recipes, losses)
    total.backward()
    parameters = [dict(part.named_parameters()) for part in (module.student, module.projector)]
    gradients = {name: p.grad for name, p in join_state(Parts(*parameters)).items()}
    return SimpleNamespace(
        losses=losses,
        total=total,
        gradients=gradients,
        expected=recipes.values("reg_loss_values")["linear"],
    )


def test_inputs_and_targets(recipes: Golden) -> None:
    io = recipes.tensors(FILE)
    noisy, target = interpolate("linear", io["latents"], io["noise"], io["t"])
    recipes.check(FILE, "model_input", noisy)
    recipes.check(FILE, "target", target)
    noisy, target = interpolate("linear", io["cls_clean"], io["cls_noise"], io["t"])
    recipes.check(FILE, "cls_input", noisy)
    recipes.check(FILE, "cls_target", target)


def test_outputs(recipes: Golden) -> None:
    io = recipes.tensors(FILE)
    module = make_module(recipes)
    with torch.no_grad():
        out = module.student(io["model_input"], io["t"], io["labels"], module.taps, io["cls_input"])
        recipes.check(FILE, "velocity", out.prediction)
        recipes.check(FILE, "cls_velocity", out.class_prediction)
        recipes.check(FILE, "projected_features", module.projector(out.features))


def test_losses_of_each_sample(recipes: Golden, reg_path: str) -> None:
    expected = recipes.values("reg_loss_values")[reg_path]
    module = make_module(recipes, kind_of(reg_path))
    for i in range(recipes.configs["reg_loss"]["batch"]):
        with torch.no_grad():
            values = sums(recipes, module, slice(i, i + 1))
        check_number(f"image of sample {i}", values[0], expected["denoise_per_sample"][i])
        check_number(f"class of sample {i}", values[-1], expected["cls_denoise_per_sample"][i])
        if "proj_per_sample" in expected:
            right = expected["proj_per_sample"][i]
            check_number(f"feature loss of sample {i}", values[1], right, floor=COSINE_FLOOR)


def test_a_batch_has_the_losses_of_its_samples(recipes: Golden, reg_path: str) -> None:
    """On the cosine path the authors' class target broadcasts over the batch: their number for the
    whole batch is another."""
    expected = recipes.values("reg_loss_values")[reg_path]
    module = make_module(recipes, kind_of(reg_path))
    with torch.no_grad():
        values = sums(recipes, module, slice(None))
    for name, place in (("denoise", 0), ("cls_denoise", -1)):
        check_number(name, values[place], sum(expected[f"{name}_per_sample"]))
    if "as_released_on_the_whole_batch" in expected:
        wrong = sum(expected["as_released_on_the_whole_batch"]["cls_denoise_per_sample"])
        assert abs(values[-1].item() - wrong) > 1e-3 * wrong


def test_means_and_total(run: SimpleNamespace) -> None:
    check_number("image", run.losses[0], run.expected["denoise_mean"])
    check_number("class", run.losses[-1], run.expected["cls_denoise_mean"])
    check_number("feature loss", run.losses[1], run.expected["proj"], floor=COSINE_FLOOR)
    check_number("total", run.total, run.expected["total"])


def test_gradient_norms(run: SimpleNamespace) -> None:
    squares = sum(gradient.double().square().sum() for gradient in run.gradients.values())
    check_number("gradient norm", squares.sqrt(), run.expected["grad_norm"])
    for name, right in run.expected["grad_l2_per_parameter"].items():
        check_number(f"gradient norm of {name}", run.gradients[name].double().norm(), right)


@pytest.mark.parametrize("term", TERMS)
def test_gradient_norm_of_each_term(recipes: Golden, term: str) -> None:
    right = recipes.values("reg_loss_values")["linear"]
    module = make_module(recipes)
    values = sums(recipes, module, slice(None)) / recipes.configs["reg_loss"]["batch"]
    values[TERMS[term]].backward()
    squares = sum(p.grad.double().square().sum() for p in module.parameters() if p.grad is not None)
    check_number(f"gradient norm of {term}", squares.sqrt(), right["grad_norm_of_each_term"][term])


def test_no_gradient_of_the_feature_loss_behind_its_block(recipes: Golden) -> None:
    # in the reference the position table is a frozen parameter, here a buffer
    without = set(recipes.values("reg_loss_values")["linear"]["parameters_without_gradient"])
    module = make_module(recipes)
    sums(recipes, module, slice(None))[TERMS["proj"]].backward()
    # no gradient of ours is missing, because all losses are one tensor: it is 0
    names = {name for name, p in module.student.named_parameters() if not p.grad.any()}
    assert names == without - {"pos_embed"}


def test_gradients(recipes: Golden, run: SimpleNamespace) -> None:
    names = [name for name in recipes.tensors(FILE) if name.startswith("grad.")]
    assert names
    for name in names:
        recipes.check(FILE, name, run.gradients[name.removeprefix("grad.")])
