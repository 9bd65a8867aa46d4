"""Issue 3, parity 7: MM-DiT, its image-token logits, and its losses."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.alignment.losses import attention_loss, feature_loss
from pipeline.checkpoints.reference_format import Parts, join_state, split_state
from pipeline.diffusion.interpolant import denoising_loss, interpolate
from pipeline.models import Taps
from pipeline.models.mmdit import MMDiT
from pipeline.models.projector import Projector
from schemas.student import StudentConfig
from tests.parity.reference import COSINE_FLOOR, Golden, check_close, check_number, probes
from tests.parity.students import make_projector, teacher_logits

FILE, LOSSES = "mmdit_io", "mmdit_loss_values"


def config_of(golden: Golden, variant: str) -> dict[str, Any]:
    """The wide variant's config names only what differs from the narrow one's."""
    return {**golden.configs["mmdit_narrow"], **golden.configs[f"mmdit_{variant}"]}


def make_mmdit(golden: Golden, variant: str) -> MMDiT:
    sizes = config_of(golden, variant)
    config = StudentConfig(
        model=f"MMDiT-{sizes['depth']}/{sizes['patch_size']}",
        latent_size=sizes["input_size"],
        latent_channels=sizes["in_channels"],
        width=sizes["hidden_size"],
        heads=sizes["num_heads"],
        text_width=sizes["context_dim"],
    )
    return MMDiT(config)


def load(student: MMDiT, state: dict[str, Tensor]) -> None:
    """The authors' files have no null caption."""
    student.load_state_dict({"null_context": student.null_context, **state})


def taps_of(golden: Golden, heads: int) -> Taps:
    blocks = golden.configs["loss"]["student_blocks_used"]
    return Taps(golden.configs["mmdit_narrow"]["encoder_depth"], tuple(blocks), heads)


@pytest.fixture(scope="module")
def narrow(golden: Golden) -> tuple[MMDiT, Projector]:
    parts = split_state(golden.tensors("mmdit_state"))
    student = make_mmdit(golden, "narrow")
    load(student, parts.student)
    return student, make_projector(parts.projector)


@pytest.fixture(scope="module")
def run(golden: Golden, narrow: tuple[MMDiT, Projector]) -> SimpleNamespace:
    """One forward pass of the narrow variant with every tap on."""
    student, projector = narrow
    io = golden.tensors(FILE)
    taps = taps_of(golden, heads=student.config.size.heads)
    with torch.no_grad():
        out = student(io["x"], io["t"], io["context"], taps)
        projected = projector(out.features)
    return SimpleNamespace(student=student, io=io, out=out, projected=projected)


def test_velocity_and_projected_features(golden: Golden, run: SimpleNamespace) -> None:
    golden.check(FILE, "velocity", run.out.prediction, strict=True)
    golden.check(FILE, "projected_features", run.projected, strict=True)


def test_velocity_without_taps_is_the_same_to_the_bit(run: SimpleNamespace) -> None:
    with torch.no_grad():
        out = run.student(run.io["x"], run.io["t"], run.io["context"])
    assert torch.equal(out.prediction, run.out.prediction)
    assert out.features is None
    assert out.attention_logits is None


def test_streams_that_leave_the_aligned_block(golden: Golden, run: SimpleNamespace) -> None:
    student, io = run.student, run.io
    image, block = golden.numbered(FILE, r"hidden_image_after_block(\d+)_sample0")
    text, _ = golden.numbered(FILE, r"hidden_context_after_block(\d+)_sample0")
    left: dict[int, tuple[Tensor, ...]] = {}
    student.joint_blocks[block].register_forward_hook(
        lambda module, inputs, output: left.update({block: output})
    )
    with torch.no_grad():
        student(io["x"][:1], io["t"][:1], io["context"][:1])
    context, x, _ = left[block]
    golden.check(FILE, image, x, strict=True)
    golden.check(FILE, text, context, strict=True)


def test_image_logits(golden: Golden, run: SimpleNamespace) -> None:
    logits, io = run.out.attention_logits, run.io
    rows = logits[0][:, :, io["attn_rows"]]
    golden.check(FILE, "attn_logits_rows_sample0", rows, strict=True)
    values = probes(logits[0], io["attn_probe_vectors"])
    golden.check(FILE, "attn_probes_sample0", values, strict=True)
    golden.check(FILE, "attn_logsumexp", logits.logsumexp(-1), strict=True)


def by_rule(names: list[str], shapes: dict[str, Tensor], offset: int) -> dict[str, Tensor]:
    """README.json, `weight_rule`: a hash of (element, tensor number) for every weight."""
    state = {}
    for number, name in enumerate(sorted(names), start=offset):
        shape = shapes[name].shape
        mask = np.uint64(0xFFFFFFFF)
        h = np.arange(shape.numel(), dtype=np.uint64)
        h = (h + np.uint64(number) * np.uint64(2654435769)) & mask
        h ^= h >> np.uint64(16)
        h = (h * np.uint64(0x7FEB352D)) & mask
        h ^= h >> np.uint64(15)
        h = (h * np.uint64(0x846CA68B)) & mask
        h ^= h >> np.uint64(16)
        exponent = -10 if name.endswith("attn.qkv.weight") else -11
        values = ((h >> np.uint64(24)).astype(np.float64) - 127.5) * 2.0**exponent
        state[name] = torch.from_numpy(values).float().view(shape)
    return state


def test_wide_variant(golden: Golden, narrow: tuple[MMDiT, Projector]) -> None:
    config, io = config_of(golden, "wide"), golden.tensors(FILE)
    student = make_mmdit(golden, "wide")
    hidden, out = narrow[1][0].out_features, narrow[1][4].out_features
    projector = Projector(student.config.size.width, hidden, out)
    blank = join_state(Parts(student.state_dict(), projector.state_dict()))
    table = blank.pop("pos_embed")
    blank.pop("null_context")
    state = by_rule(list(blank), blank, config["ordinal_offset"])
    for name, values in config["first_four_values"].items():
        assert state[name].flatten()[: len(values)].tolist() == values
    for name, (_, total, norm) in config["tensor_number_sum_l2"].items():
        assert state[name].double().sum().item() == pytest.approx(total, abs=1e-9)
        assert state[name].double().norm().item() == pytest.approx(norm, rel=1e-12)
    parts = split_state(state)
    load(student, {**parts.student, "pos_embed": table})
    projector.load_state_dict(parts.projector)

    with torch.no_grad():
        taps = taps_of(golden, heads=config["num_heads"])
        result = student(io["x"][:1], io["t"][:1], io["context"][:1], taps)
        projected = projector(result.features)
    recorded = io["wide_attn_logits_rows"]
    # README.json: "every fourth entry of attn_rows"
    rows = result.attention_logits[0][:, : recorded.shape[1], io["attn_rows"][::4]]
    golden.check(FILE, "wide_velocity", result.prediction, strict=True)
    golden.check(FILE, "wide_projected_features", projected, strict=True)
    golden.check(FILE, "wide_attn_logits_rows", rows, strict=True)


@pytest.mark.parametrize("total", ["attention_on", "attention_zeroed_as_released"])
def test_losses_and_gradients(golden: Golden, narrow: tuple[MMDiT, Projector], total: str) -> None:
    student, projector = narrow
    io, teacher = golden.tensors(FILE), golden.tensors("loss_io")
    expected, loss = golden.values(LOSSES), golden.configs["loss"]
    heads = min(student.config.size.heads, teacher["teacher_attn_q"].shape[2])
    x_t, target = interpolate("linear", io["loss_latents"], io["loss_noise"], io["loss_t"])

    out = student(x_t, io["loss_t"], io["context"], taps_of(golden, heads))
    denoising = denoising_loss(out.prediction, target)
    features = feature_loss(projector(out.features), teacher["teacher_features"]).mean()
    probabilities = torch.softmax(teacher_logits(golden), dim=-1)
    attention = attention_loss(out.attention_logits, probabilities).mean()
    for ours, theirs in zip(denoising, expected["denoise_per_sample"], strict=True):
        check_number("denoising loss", ours, theirs)
    check_number("feature loss", features, expected["proj"], floor=COSINE_FLOOR)
    check_number("attention loss", attention, expected["attn"])

    weight = loss["attn_coeff"] if total == "attention_on" else 0.0
    sum_ = denoising.mean() + loss["proj_coeff"] * features + weight * attention
    check_number("total", sum_, expected[total]["total"])
    both = torch.nn.ModuleList([student, projector])
    both.zero_grad()
    sum_.backward()
    gradients = join_state(
        Parts(
            {name: p.grad for name, p in student.named_parameters()},
            {name: p.grad for name, p in projector.named_parameters()},
        )
    )
    norms = expected[total]["grad_l2_per_parameter"]
    assert gradients.keys() == norms.keys()
    for name, gradient in gradients.items():
        check_number(f"gradient norm of {name}", gradient.double().norm(), norms[name])
    squares = sum(gradient.double().square().sum() for gradient in gradients.values())
    check_number("gradient norm", squares.sqrt(), expected[total]["grad_norm"])


def test_position_table_is_the_reference_s(golden: Golden) -> None:
    table, recorded = make_mmdit(golden, "narrow").pos_embed, golden.tensors("mmdit_state")
    tolerance = golden.tolerance("mmdit_state", "pos_embed")
    check_close("pos_embed", table, recorded["pos_embed"], tolerance)
