"""Issue 3, parity 1: SiT with the given weights."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from pipeline.checkpoints.reference_format import Parts, join_state, split_state
from pipeline.models import Taps
from pipeline.models.layers import position_table
from tests.parity.reference import Golden, entropy, probes
from tests.parity.students import all_taps, make_projector, make_sit

FILE = "sit_io"


@pytest.fixture(scope="module")
def run(golden: Golden) -> SimpleNamespace:
    """One forward pass with every tap on."""
    student, projector = make_sit(golden)
    io = golden.tensors(FILE)
    taps = all_taps(golden, heads=student.config.size.heads)
    with torch.no_grad():
        out = student(io["x"], io["t"], io["y"], taps)
        projected = projector(out.features)
    return SimpleNamespace(student=student, io=io, out=out, projected=projected)


def test_velocity(golden: Golden, run: SimpleNamespace) -> None:
    golden.check(FILE, "velocity", run.out.prediction, strict=True)


def test_velocity_of_the_null_label(golden: Golden, run: SimpleNamespace) -> None:
    null = torch.full_like(run.io["y"], golden.configs["sit"]["null_label_id"])
    with torch.no_grad():
        velocity = run.student(run.io["x"], run.io["t"], null).prediction
    golden.check(FILE, "velocity_null_label", velocity, strict=True)


def test_velocity_without_taps_is_the_same_to_the_bit(run: SimpleNamespace) -> None:
    with torch.no_grad():
        out = run.student(run.io["x"], run.io["t"], run.io["y"])
    assert torch.equal(out.prediction, run.out.prediction)
    assert out.features is None
    assert out.attention_logits is None


def test_projected_features(golden: Golden, run: SimpleNamespace) -> None:
    golden.check(FILE, "projected_features", run.projected, strict=True)


def test_tokens_that_leave_the_aligned_block(golden: Golden, run: SimpleNamespace) -> None:
    name, block = golden.numbered(FILE, r"hidden_after_block(\d+)_sample0")
    with torch.no_grad():
        out = run.student(run.io["x"], run.io["t"], run.io["y"], Taps(feature_depth=block + 1))
    golden.check(FILE, name, out.features[:1], strict=True)


def test_attention_logits_at_some_queries(golden: Golden, run: SimpleNamespace) -> None:
    rows = run.out.attention_logits[0][:, :, run.io["attn_rows"]]
    golden.check(FILE, "attn_logits_rows_sample0", rows, strict=True)


def test_every_attention_logit_through_probes(golden: Golden, run: SimpleNamespace) -> None:
    values = probes(run.out.attention_logits[0], run.io["attn_probe_vectors"])
    golden.check(FILE, "attn_probes_sample0", values, strict=True)


def test_logsumexp_and_entropy_of_the_attention(golden: Golden, run: SimpleNamespace) -> None:
    logits = run.out.attention_logits
    golden.check(FILE, "attn_logsumexp", logits.logsumexp(-1), strict=True)
    golden.check(FILE, "attn_entropy", entropy(logits), strict=True)


def test_tokens_and_conditioning_that_enter_the_blocks(
    golden: Golden, run: SimpleNamespace
) -> None:
    student, io = run.student, run.io
    with torch.no_grad():
        tokens = student.x_embedder(io["x"][:1]) + student.pos_embed
        conditioning = student.t_embedder(io["t"]) + student.y_embedder(io["y"])
    golden.check(FILE, "tokens_in_sample0", tokens, strict=True)
    golden.check(FILE, "conditioning", conditioning, strict=True)


def test_position_table_is_the_reference_s(golden: Golden, run: SimpleNamespace) -> None:
    # `run.student` took its table from the file; a new run of ours makes its own
    table = position_table(run.student.config.size.width, *run.student.grid)
    golden.check("sit_state", "pos_embed", table)


def test_exported_names_stand_in_the_reference_s_order(
    golden: Golden, run: SimpleNamespace
) -> None:
    # a checkpoint's optimizer state numbers the parameters in this order
    parts = split_state(golden.tensors("sit_state"))
    ours = Parts(run.student.state_dict(), make_projector(parts.projector).state_dict())
    recorded = golden.readme["files"]["sit_state.safetensors"]["tensors"]
    assert list(join_state(ours)) == list(recorded)
