"""Loading a student from a checkpoint, for sampling."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from pipeline.checkpoints.local import latest_checkpoint
from pipeline.checkpoints.reference_format import read_classes, read_export, student_from_file
from pipeline.checkpoints.selection import is_weights_file
from pipeline.checkpoints.state import CheckpointState, load_weights, read_state
from pipeline.models import Student, make_student
from pipeline.models.factory import Uninitialised
from pipeline.precision import check_finite
from schemas.classes import ClassTable
from schemas.diffusion import Convention
from schemas.errors import UserError
from schemas.networks import AutoencoderInfo, TextEncoderInfo
from schemas.sample import FileOptions
from schemas.student import StudentConfig

CLIP = "openai/clip-vit-large-patch14"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadedStudent:
    """A student and the facts that sampling needs."""

    student: Student
    encoder: AutoencoderInfo | None
    """Autoencoder of the training latents; None for a .pt file that does not record it."""
    step: int | None
    """Training step; None for a .pt file, which does not record it."""
    classes: ClassTable
    """Classes that the student was trained on, as far as the checkpoint records them."""
    text_encoder: TextEncoderInfo | None = None
    """Encoder of the captions that an MMDiT was trained on; None for other students."""
    lacks_null: bool = False
    """The null caption is not among the weights, as in an MMDiT's file of another repository."""


def load_trained_student(
    checkpoint: Path,
    weights: str = "ema",
    model: str | None = None,
    options: FileOptions | None = None,
) -> LoadedStudent:
    """Load from the folder of a run or of one checkpoint, or from a .pt file of this project or of
    the SiT, DiT, REPA or HASTE repositories, whose architecture ``model`` names and whose facts
    ``options`` complete. Raises ``UserError``."""
    if is_weights_file(checkpoint):
        return _load_file(checkpoint, weights, model, options)
    given = {"model": model, **(options or FileOptions()).model_dump()}
    for name, value in given.items():
        if value is not None:
            raise UserError(
                f"--{name.replace('_', '-')} is for a .pt file; --checkpoint '{checkpoint}' is a "
                "folder that says what it holds"
            )
    student, state = load_student(checkpoint, weights)
    return LoadedStudent(student, state.autoencoder, state.step, state.classes, state.text_encoder)


def _load_file(
    file: Path, weights: str, model: str | None, options: FileOptions | None
) -> LoadedStudent:
    run = read_export(file)
    if run is None and model is None:
        raise UserError(
            f"--checkpoint '{file}' does not record its architecture: add --model, for example "
            "--model SiT-XL/2"
        )
    student = student_from_file(file, model, weights, options).requires_grad_(False).eval()
    family = student.config.family
    if family != "DiT":
        convention = student.convention
        condition = f"{student.config.num_classes} classes"
        if student.null_label is None:
            condition += ' without "no class"'
        logger.info(
            "'%s' is drawn as a %s path, %s, data at time %d, %s",
            file.name,
            convention.path,
            convention.prediction,
            convention.data_time,
            condition if family == "SiT" else "captions",
        )
    classes = read_classes(file, student.config.num_classes)
    if run is None:
        text = None if family != "MMDiT" else _clip(student.config)
        return LoadedStudent(student, None, None, classes, text, lacks_null=text is not None)
    return LoadedStudent(student, run.autoencoder, None, classes, run.text_encoder)


def _clip(student: StudentConfig) -> TextEncoderInfo:
    """The encoder of U-ViT's, REPA's and HASTE's captions, whose files do not name it."""
    tokens, width = student.text_shape
    return TextEncoderInfo(
        encoder=CLIP,
        weights="source",
        seed=0,
        model_args={},
        weights_sha256=None,
        tokenizer=CLIP,
        tokenizer_sha256=None,
        tokens=tokens,
        width=width,
    )


def load_student(folder: Path, weights: str = "ema") -> tuple[Student, CheckpointState]:
    """Student and state of a checkpoint, or of the latest valid checkpoint of a run."""
    latest = latest_checkpoint(folder)
    if latest is None:
        raise UserError(f"--checkpoint '{folder}' holds no checkpoint")
    state = read_state(latest)
    with Uninitialised():
        student = make_student(
            state.config.student, convention=Convention(path=state.config.diffusion.path)
        )
    if state.config.diffusion.label_drop == 0:
        student.null_label = None
    load_weights(latest, weights, student)
    check_finite(student.state_dict(), f"checkpoint '{latest}', {weights}.safetensors")
    return student.requires_grad_(False).eval(), state
