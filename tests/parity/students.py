"""The reference's small students in our classes, with the recorded weights."""

from __future__ import annotations

from torch import Tensor

from pipeline.checkpoints.reference_format import split_state
from pipeline.models import SiT, Taps
from pipeline.models.projector import Projector
from schemas.alignment import AlignmentConfig
from schemas.student import StudentConfig
from tests.parity.reference import Golden


def student_config(golden: Golden) -> StudentConfig:
    sit = golden.configs["sit"]
    return StudentConfig(
        model=f"SiT-S/{sit['patch_size']}",
        latent_size=sit["input_size"],
        latent_channels=sit["in_channels"],
        num_classes=sit["num_classes"],
        depth=sit["depth"],
        width=sit["hidden_size"],
        heads=sit["num_heads"],
    )


def alignment_config(golden: Golden, coefficients: str = "loss") -> AlignmentConfig:
    """Layer pairs, depth and projector width; the weights of the losses are those of a config."""
    loss = golden.configs["loss"]
    return AlignmentConfig(
        feature_weight=golden.configs[coefficients]["proj_coeff"],
        attention_weight=golden.configs[coefficients]["attn_coeff"],
        feature_depth=golden.configs["sit"]["encoder_depth"],
        student_layers=loss["student_blocks_used"],
        teacher_layers=loss["teacher_layers_used"],
        projector_width=golden.configs["sit"]["projector_dim"],
    )


def make_sit(golden: Golden) -> tuple[SiT, Projector]:
    """Student and projector, their weights imported from the authors' key format."""
    parts = split_state(golden.tensors("sit_state"))
    student = SiT(student_config(golden))
    student.load_state_dict(parts.student)
    projector = make_projector(parts.projector)
    return student, projector


def make_projector(state: dict[str, Tensor]) -> Projector:
    hidden, width = state["0.weight"].shape
    projector = Projector(width, hidden, state["4.weight"].shape[0])
    projector.load_state_dict(state)
    return projector


def all_taps(golden: Golden, heads: int) -> Taps:
    alignment = alignment_config(golden)
    return Taps(alignment.feature_depth, alignment.student_layers, heads)


def teacher_logits(golden: Golden) -> Tensor:
    """(B, L, H, N, N): the recorded factors multiply exactly in float32."""
    io = golden.tensors("loss_io")
    return io["teacher_attn_q"] @ io["teacher_attn_k"].transpose(-2, -1)
