"""iREPA: targets, projectors, losses and gradients of the authors' code."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.checkpoints.reference_format import Parts, join_state, split_state
from pipeline.diffusion.normalisation import Normalisation, normalise
from pipeline.models import Taps
from pipeline.targets.kinds import spatially_normalised
from schemas.alignment import AlignmentConfig
from tests.parity.recipe_runs import (
    check_gradients,
    check_losses,
    loss_call,
    make_module,
    student_config,
)
from tests.parity.reference import Golden, check_close

FILE = "irepa_io"


def variants(recipes: Golden) -> dict[str, dict[str, Tensor]]:
    """State of each variant, under the authors' names; the file holds one trunk, the projector of
    the convolution with the largest kernel, and further projectors with their variant's name."""
    state = recipes.tensors("irepa_state")
    trunk = {name: t for name, t in state.items() if ":" not in name}
    own = {name for name in trunk if name.startswith("projectors.")}
    kernel = next(trunk[name].shape[-1] for name in own if name.endswith("weight"))
    found = {f"conv{kernel}": trunk}
    for name, tensor in state.items():
        if ":" in name:
            variant, _, key = name.partition(":")
            base = {n: t for n, t in trunk.items() if n not in own}
            found.setdefault(variant, base)[key] = tensor
    return found


def options(recipes: Golden, parts: Parts, run: dict[str, Any]) -> AlignmentConfig:
    sizes, convolution = recipes.configs["irepa"], "weight" in parts.projector
    spatial = run["spnorm"] != "none"
    return AlignmentConfig(
        feature_weight=float(run["proj_coeff"]),
        attention_weight=0,
        feature_depth=sizes["encoder_depth"],
        student_layers=(),
        teacher_layers=(),
        projector="conv" if convolution else "mlp",
        projector_kernel=parts.projector["weight"].shape[-1] if convolution else None,
        projector_width=sizes["projector_dim"],
        normalisation="spatial" if spatial else "none",
        normalisation_strength=run["alpha"] if spatial else None,
    )


def numbered_targets(recipes: Golden, prefix: str) -> dict[str, float]:
    """Recorded targets, each with its strength."""
    matches = (re.fullmatch(rf"{prefix}([\d.]+)", name) for name in recipes.tensors(FILE))
    return {match[0]: float(match[1]) for match in matches if match}


def test_targets_of_every_strength(recipes: Golden) -> None:
    features = recipes.tensors(FILE)["teacher_features"]
    found = numbered_targets(recipes, "target_alpha")
    assert found
    for name, strength in found.items():
        recipes.check(FILE, name, spatially_normalised(features, strength))


def test_a_channel_that_is_constant_over_an_image_becomes_zero(recipes: Golden) -> None:
    """As the authors' formula makes it with strength 1; with less theirs divides by 1e-6."""
    io = recipes.tensors(FILE)
    found = numbered_targets(recipes, "flat_channel_target_alpha")
    assert found
    for name, strength in found.items():
        flat = (io[name] == io[name][:, :1]).all(1).all(0)
        assert flat.any()
        features = io["teacher_features"][: len(io[name])].clone()
        features[..., flat] = 0.5
        ours = spatially_normalised(features, strength)
        assert (ours[..., flat] == 0).all()
        tolerance = recipes.tolerance(FILE, name)
        check_close(name, ours[..., ~flat], io[name][..., ~flat], tolerance)


def test_tokens_and_projectors(recipes: Golden) -> None:
    io, sizes = recipes.tensors(FILE), recipes.configs["irepa"]
    hidden, block = recipes.numbered(FILE, r"hidden_after_block(\d+)")
    assert block + 1 == sizes["encoder_depth"]
    states = variants(recipes)
    names = {name.removeprefix("projected.") for name in io if name.startswith("projected.")}
    assert names == states.keys()
    for variant, state in states.items():
        parts = split_state(state)
        config = options(recipes, parts, {"proj_coeff": 1, "spnorm": "none"})
        module = make_module(
            student_config(sizes, state), config, parts, [io["teacher_features"].shape[-1]]
        )
        (_, projector), *_ = module.projectors()
        recipes.check(FILE, f"projected.{variant}", projector(io[hidden]))
        x_t = (1 - io["t"]).view(-1, 1, 1, 1) * io["latents"] + io["t"].view(-1, 1, 1, 1) * io[
            "noise"
        ]
        out = module.student(x_t, io["t"], io["labels"], Taps(feature_depth=block + 1))
        recipes.check(FILE, hidden, out.features)


@pytest.fixture
def run(recipes: Golden, irepa_run: str) -> SimpleNamespace:
    settings = recipes.configs["irepa"]["runs"][irepa_run]
    state, io = variants(recipes)[settings["variant"]], recipes.tensors(FILE)
    parts = split_state(state)
    features = io["teacher_features"]
    module = make_module(
        student_config(recipes.configs["irepa"], state),
        options(recipes, parts, settings),
        parts,
        [features.shape[-1]],
    )
    return loss_call(module, "linear", io, io["t"], [features])


def test_losses(recipes: Golden, irepa_run: str, run: SimpleNamespace) -> None:
    check_losses(run, recipes.values("irepa_loss_values")[irepa_run])
    recipes.check(FILE, "velocity", run.velocity)


def test_gradients(recipes: Golden, irepa_run: str, run: SimpleNamespace) -> None:
    expected = recipes.values("irepa_loss_values")[irepa_run]
    check_gradients(recipes, FILE, f"grad.{irepa_run}.", run, expected)


def test_names_are_kept(recipes: Golden) -> None:
    """A convolution is exported under iREPA's names, an MLP under REPA's."""
    for state in variants(recipes).values():
        parts = split_state(state)
        names = set(join_state(parts))
        convolution = "weight" in parts.projector
        theirs = {n if convolution else n.replace("projection_layer.", "") for n in state}
        assert names == theirs


def test_latents_with_statistics_of_each_channel(recipes: Golden) -> None:
    io = recipes.tensors(FILE)
    mean, std = io["posterior.moments"].chunk(2, dim=1)
    by = Normalisation(
        1.0,
        latents_mean=tuple(io["posterior.latents_bias"].flatten().tolist()),
        latents_std=tuple((1 / io["posterior.latents_scale"].double()).flatten().tolist()),
    )
    recipes.check(FILE, "posterior.latents", normalise(mean + std * io["posterior.eps"], by))
    assert torch.equal(mean, io["posterior.moments"][:, : mean.shape[1]])
