"""Issue 3, parity 2: losses, gradients and the gradient norm, with and without alignment."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from pipeline.alignment.aligned_student import LOSSES, AlignedStudent
from pipeline.alignment.losses import Targets, attention_loss
from pipeline.checkpoints.reference_format import Parts, join_state
from pipeline.diffusion.interpolant import denoising_loss, interpolate
from tests.parity.reference import COSINE_FLOOR, Golden, check_number
from tests.parity.students import alignment_config, make_sit, student_config, teacher_logits

FILE = "loss_io"


@pytest.fixture(params=[True, False], ids=["aligned", "denoise_only"])
def aligned(request: pytest.FixtureRequest) -> bool:
    return request.param


@pytest.fixture
def module(golden: Golden, aligned: bool) -> AlignedStudent:
    """What the trainer trains, with the recorded weights, before or after the termination."""
    student, projector = make_sit(golden)
    io = golden.tensors(FILE)
    module = AlignedStudent(
        student_config(golden),
        alignment_config(golden),
        teacher_width=io["teacher_features"].shape[-1],
        heads=min(io["teacher_attn_q"].shape[2], student.config.size.heads),
    )
    module.student, module.projector = student, projector
    if not aligned:
        module.release_alignment()
    return module


@pytest.fixture
def run(golden: Golden, path: str, module: AlignedStudent, aligned: bool) -> SimpleNamespace:
    """The total of one batch and its gradients, by the reference's parameter names."""
    io = golden.tensors(FILE)
    expected = golden.values("loss_values")[f"{path}_{'align' if aligned else 'denoise_only'}"]
    x_t, velocity = interpolate(path, io["latents"], io[f"{path}_noise"], io[f"{path}_t"])
    attention = torch.softmax(teacher_logits(golden), dim=-1)
    targets = Targets(io["teacher_features"], attention) if aligned else Targets(None, None)
    sums = module(x_t, io[f"{path}_t"], io["labels"], velocity, targets)
    losses = dict(zip(LOSSES, sums / len(x_t), strict=True))
    total = losses["denoising"]
    if aligned:
        total = total + golden.configs["loss"]["proj_coeff"] * losses["feature"]
        total = total + golden.configs["loss"]["attn_coeff"] * losses["attention"]
    total.backward()
    gradients = join_state(
        Parts(
            {name: p.grad for name, p in module.student.named_parameters()},
            {name: p.grad for name, p in module.projector.named_parameters()} if aligned else {},
        )
    )
    return SimpleNamespace(losses=losses, total=total, gradients=gradients, expected=expected)


def test_noisy_latents_and_targets(golden: Golden, path: str) -> None:
    io = golden.tensors(FILE)
    x_t, velocity = interpolate(path, io["latents"], io[f"{path}_noise"], io[f"{path}_t"])
    golden.check(FILE, f"{path}_model_input", x_t)
    golden.check(FILE, f"{path}_target", velocity)


def test_denoising_loss_of_each_sample(golden: Golden, path: str) -> None:
    io = golden.tensors(FILE)
    x_t, velocity = interpolate(path, io["latents"], io[f"{path}_noise"], io[f"{path}_t"])
    student, _ = make_sit(golden)
    with torch.no_grad():
        out = student(x_t, io[f"{path}_t"], io["labels"])
    losses = denoising_loss(out.prediction, velocity).tolist()
    expected = golden.values("loss_values")[f"{path}_align"]["denoise_per_sample"]
    for i, (ours, theirs) in enumerate(zip(losses, expected, strict=True)):
        check_number(f"denoising loss of sample {i}", ours, theirs)


def test_attention_loss_of_each_layer_pair(
    golden: Golden, path: str, module: AlignedStudent, aligned: bool
) -> None:
    io = golden.tensors(FILE)
    expected = golden.values("loss_values")[f"{path}_align"]["derived_cross_entropy_per_pair"]
    x_t, _ = interpolate(path, io["latents"], io[f"{path}_noise"], io[f"{path}_t"])
    with torch.no_grad():
        logits = module.student(x_t, io[f"{path}_t"], io["labels"], module.taps).attention_logits
    if not aligned:
        assert logits is None
        return
    attention = torch.softmax(teacher_logits(golden), dim=-1)
    for pair, theirs in enumerate(expected):
        ours = attention_loss(logits[:, pair : pair + 1], attention[:, pair : pair + 1]).mean()
        check_number(f"cross-entropy of pair {pair}", ours, theirs)


def test_losses_and_total(run: SimpleNamespace) -> None:
    check_number("denoising loss", run.losses["denoising"], run.expected["denoise_mean"])
    check_number("feature loss", run.losses["feature"], run.expected["proj"], floor=COSINE_FLOOR)
    check_number("attention loss", run.losses["attention"], run.expected["attn"])
    check_number("total", run.total, run.expected["total"])


def test_gradient_norm(run: SimpleNamespace) -> None:
    squares = sum(gradient.double().square().sum() for gradient in run.gradients.values())
    check_number("gradient norm", squares.sqrt(), run.expected["grad_norm"])


def test_gradient_norm_of_every_parameter(run: SimpleNamespace) -> None:
    expected = run.expected["grad_l2_per_parameter"]
    assert run.gradients.keys() == expected.keys()
    for name, gradient in run.gradients.items():
        check_number(f"gradient norm of {name}", gradient.double().norm(), expected[name])


def test_no_gradient_where_the_reference_has_none(golden: Golden, run: SimpleNamespace) -> None:
    # in the reference the position table is a frozen parameter, here a buffer
    without = golden.tensors("sit_state").keys() - run.gradients.keys()
    assert without == set(run.expected["parameters_without_gradient"])


def test_gradients(golden: Golden, path: str, run: SimpleNamespace, aligned: bool) -> None:
    if not aligned:  # recorded with alignment on; off, they must differ
        name = f"{path}_grad.x_embedder.proj.weight"
        recorded = golden.tensors(FILE)[name]
        assert not torch.allclose(run.gradients["x_embedder.proj.weight"], recorded, rtol=1e-3)
        return
    names = [name for name in golden.tensors(FILE) if name.startswith(f"{path}_grad.")]
    assert names
    for name in names:
        golden.check(FILE, name, run.gradients[name.removeprefix(f"{path}_grad.")])
