"""REG's small student and the recorded steps of its training, in our classes."""

from __future__ import annotations

from pipeline.checkpoints.reference_format import split_state
from pipeline.models import SiT
from pipeline.models.projector import Projector
from schemas.student import StudentConfig
from tests.parity.reference import Golden
from tests.parity.students import make_projector


def student_config(recipes: Golden) -> StudentConfig:
    reg = recipes.configs["reg"]
    return StudentConfig(
        model=f"SiT-S/{reg['patch_size']}",
        latent_size=reg["input_size"],
        latent_channels=reg["in_channels"],
        num_classes=reg["num_classes"],
        depth=reg["depth"],
        width=reg["hidden_size"],
        heads=reg["num_heads"],
        class_token=reg["class_token_dim"],
    )


def make_reg(recipes: Golden) -> tuple[SiT, Projector]:
    """Student and projector with the recorded weights."""
    parts = split_state(recipes.tensors("reg_state"))
    student = SiT(student_config(recipes), qk_norm=recipes.configs["reg"]["qk_norm"])
    student.load_state_dict(parts.student)
    return student, make_projector(parts.projector)
