"""One loss call of the reference's small students with further projectors and targets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from pipeline.alignment.aligned_student import LOSSES, AlignedStudent, AlignedTeacher
from pipeline.alignment.losses import Targets
from pipeline.checkpoints.reference_format import Parts, join_state
from pipeline.diffusion.interpolant import interpolate
from pipeline.targets.kinds import target_normalisation
from schemas.alignment import AlignmentConfig
from schemas.diffusion import Path
from schemas.student import StudentConfig
from tests.parity.reference import COSINE_FLOOR, Golden, check_number


def student_config(sizes: Mapping[str, Any], state: Mapping[str, Tensor]) -> StudentConfig:
    return StudentConfig(
        model=f"SiT-S/{sizes['patch_size']}",
        latent_size=sizes["input_size"],
        latent_channels=state["x_embedder.proj.weight"].shape[1],
        num_classes=sizes["num_classes"],
        depth=sizes["depth"],
        width=sizes["hidden_size"],
        heads=sizes["num_heads"],
    )


def make_module(
    student: StudentConfig, alignment: AlignmentConfig, parts: Parts, widths: Sequence[int]
) -> AlignedStudent:
    """An ``AlignedStudent`` with the weights of ``parts``; ``widths``: those of the teachers."""
    module = AlignedStudent(
        student,
        alignment,
        teacher_width=widths[0],
        heads=1,
        others=[AlignedTeacher(width, 1) for width in widths[1:]],
    )
    module.student.load_state_dict(parts.student)
    for number, projector in module.projectors():
        projector.load_state_dict((parts.projector, *parts.others)[number])
    return module


def loss_call(
    module: AlignedStudent,
    path: Path,
    io: Mapping[str, Tensor],
    t_B: Tensor,
    features: Sequence[Tensor],
) -> SimpleNamespace:
    """Losses and the total of one batch, with the gradients by the reference's names."""
    x_t, velocity = interpolate(path, io["latents"], io["noise"], t_B)
    targets = [
        Targets(target_normalisation(options.normalisation_strength)(teacher), None)
        for options, teacher in zip(module.alignment.streams, features, strict=True)
    ]
    sums = module(x_t, t_B, io["labels"], velocity, *targets) / len(x_t)
    losses = dict(zip(module.losses, sums, strict=True))
    total = losses["denoising"] + module.alignment.feature_weights * losses["feature"]
    total.backward()
    prediction = module.student(x_t, t_B, io["labels"]).prediction
    grads = [
        {name: p.grad for name, p in projector.named_parameters()}
        for _, projector in module.projectors()
    ]
    student = {name: p.grad for name, p in module.student.named_parameters()}
    gradients = join_state(Parts(student, grads[0], tuple(grads[1:])))
    return SimpleNamespace(losses=losses, total=total, gradients=gradients, velocity=prediction)


def check_losses(found: SimpleNamespace, expected: Mapping[str, Any]) -> None:
    assert set(LOSSES) <= found.losses.keys()
    denoising = expected["denoise_per_sample"]
    check_number("denoising loss", found.losses["denoising"], sum(denoising) / len(denoising))
    check_number("feature loss", found.losses["feature"], expected["proj"], floor=COSINE_FLOOR)
    check_number("total", found.total, expected["total"])


def check_gradients(
    golden: Golden, file: str, prefix: str, found: SimpleNamespace, expected: Mapping[str, Any]
) -> None:
    """Norms of all gradients, and the recorded ones, whose names begin with ``prefix``."""
    norms = expected["grad_l2_per_parameter"]
    ours = {name: found.gradients[rename(name, found.gradients)] for name in norms}
    assert len(ours) == len(found.gradients)
    squares = sum(gradient.double().square().sum() for gradient in ours.values())
    check_number("gradient norm", torch.as_tensor(squares).sqrt(), expected["grad_norm"])
    for name, norm in norms.items():
        check_number(f"gradient norm of {name}", ours[name].double().norm(), norm)
    for name in golden.tensors(file):
        if name.startswith(prefix):
            golden.check(file, name, ours[name.removeprefix(prefix)])


def rename(name: str, ours: Mapping[str, Tensor]) -> str:
    """Our name of a reference's weight: iREPA's MLP has ``projection_layer.`` before its layers."""
    return name if name in ours else name.replace("projection_layer.", "")
