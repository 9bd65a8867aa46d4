"""REG's small student and the recorded steps of its training, in our classes."""

from __future__ import annotations

from pipeline.alignment.aligned_student import AlignedStudent
from pipeline.checkpoints.reference_format import split_state
from pipeline.models import SiT
from pipeline.models.projector import Projector
from schemas.alignment import AlignmentConfig
from schemas.diffusion import DiffusionConfig
from schemas.store import Manifest
from schemas.streams import ClassStream, Column
from schemas.student import StudentConfig
from tests.parity.reference import Golden
from tests.parity.students import make_projector
from tests.stores import random_manifest


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


def alignment_config(recipes: Golden) -> AlignmentConfig:
    reg = recipes.configs["reg"]
    return AlignmentConfig(
        feature_weight=recipes.configs["reg_loss"]["proj_coeff"],
        attention_weight=0,
        feature_depth=reg["encoder_depth"],
        projector_width=reg["projector_dim"],
    )


def make_module(recipes: Golden, path: str = "linear") -> AlignedStudent:
    """The trained module, with the recorded weights."""
    student, projector = make_reg(recipes)
    module = AlignedStudent(
        student_config(recipes),
        alignment_config(recipes),
        teacher_width=recipes.configs["reg"]["class_token_dim"],
        heads=1,
        diffusion=DiffusionConfig.model_validate({"path": path}),
        class_streams=[0],
    )
    module.student, module.projector = student, projector
    return module


def manifest_of(recipes: Golden) -> Manifest:
    """A manifest with the recorded teacher's widths, class tokens and latent scale."""
    student, train = student_config(recipes), recipes.values("reg_train_values")["config"]
    blank = random_manifest(samples=1, shard_size=1)
    name, stream = blank.teacher_stream()
    width = recipes.configs["reg"]["class_token_dim"]
    sizes = {"width": width, "heads": 1, "head_width": width, "grid": student.grid}
    teacher = stream.teacher.model_copy(update=sizes)
    tokens = ClassStream(
        kind="class",
        columns={"class_token": Column(shape=(width,), codec="float32")},
        teacher=teacher.model_copy(update={"layers": ()}),
        compute=stream.compute,
    )
    autoencoder = blank.autoencoder.model_copy(
        update={
            "scaling_factor": train["latents_scale"],
            "shift_factor": -train["latents_bias"] / train["latents_scale"],
            "latent_shape": student.latent_shape,
        }
    )
    streams = {**blank.streams, name: stream.model_copy(update={"teacher": teacher})}
    dataset = blank.dataset.model_copy(update={"num_classes": student.num_classes})
    return blank.model_copy(
        update={
            "streams": {**streams, "class": tokens},
            "autoencoder": autoencoder,
            "dataset": dataset,
        }
    )
