"""REG's SiT with the given weights: the class token enters, passes and leaves the blocks."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from pipeline.checkpoints.reference_format import Parts, join_state
from pipeline.models import SiT, Taps
from tests.parity.reference import Golden
from tests.parity.reg import make_reg, student_config

FILE = "reg_io"


@pytest.fixture(scope="module")
def run(recipes: Golden) -> SimpleNamespace:
    """One forward pass with the tokens of the aligned block, the input of the first block and the
    output of the last."""
    student, projector = make_reg(recipes)
    io, seen = recipes.tensors(FILE), {}
    student.blocks[0].register_forward_pre_hook(lambda _, args: seen.update(first=args))
    student.blocks[-1].register_forward_hook(lambda _, __, out: seen.update(last=out[0]))
    with torch.no_grad():
        out = student(
            io["x"],
            io["t"],
            io["y"],
            Taps(feature_depth=recipes.configs["reg"]["encoder_depth"]),
            class_token_BE=io["cls_token"],
        )
        projected = projector(out.features)
    return SimpleNamespace(
        student=student, projector=projector, io=io, out=out, projected=projected, **seen
    )


def test_velocities(recipes: Golden, run: SimpleNamespace) -> None:
    recipes.check(FILE, "velocity", run.out.prediction, strict=True)
    recipes.check(FILE, "cls_velocity", run.out.class_prediction, strict=True)


def test_velocities_of_the_null_label(recipes: Golden, run: SimpleNamespace) -> None:
    io = run.io
    null = torch.full_like(io["y"], run.student.null_label)
    assert run.student.null_label == recipes.configs["reg"]["num_classes"]
    with torch.no_grad():
        out = run.student(io["x"], io["t"], null, class_token_BE=io["cls_token"])
    recipes.check(FILE, "velocity_null_label", out.prediction, strict=True)
    recipes.check(FILE, "cls_velocity_null_label", out.class_prediction, strict=True)


def test_projected_features_are_those_of_all_tokens(recipes: Golden, run: SimpleNamespace) -> None:
    recipes.check(FILE, "projected_features", run.projected, strict=True)
    assert run.projected.shape[1] == recipes.configs["reg"]["tokens"]


def test_class_token_is_embedded(recipes: Golden, run: SimpleNamespace) -> None:
    with torch.no_grad():
        linear = run.student.cls_projectors2(run.io["cls_token"])
        recipes.check(FILE, "cls_after_linear", linear, strict=True)
        recipes.check(FILE, "cls_embedded", run.student.wg_norm(linear), strict=True)


def test_tokens_and_conditioning_that_enter_the_blocks(
    recipes: Golden, run: SimpleNamespace
) -> None:
    tokens, conditioning = run.first
    recipes.check(FILE, "tokens_in", tokens, strict=True)
    recipes.check(FILE, "conditioning", conditioning, strict=True)


def test_tokens_that_leave_blocks(recipes: Golden, run: SimpleNamespace) -> None:
    name, block = recipes.numbered(FILE, r"hidden_after_block(\d+)_sample0")
    assert block + 1 == recipes.configs["reg"]["encoder_depth"]
    recipes.check(FILE, name, run.out.features[:1], strict=True)
    recipes.check(FILE, "hidden_after_last_block_sample0", run.last[:1], strict=True)


def test_position_table_is_the_reference_s(recipes: Golden) -> None:
    # `run.student` took its table from the file; a new run of ours makes its own
    recipes.check("reg_state", "pos_embed", SiT(student_config(recipes)).pos_embed)


def test_exported_names_stand_in_the_reference_s_order(
    recipes: Golden, run: SimpleNamespace
) -> None:
    # a checkpoint's optimizer state numbers the parameters in this order
    ours = Parts(run.student.state_dict(), run.projector.state_dict())
    recorded = recipes.readme["files"]["reg_state.safetensors"]["tensors"]
    assert list(join_state(ours)) == list(recorded)
