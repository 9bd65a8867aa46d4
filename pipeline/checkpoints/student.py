"""Loading a student from a checkpoint, for sampling."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pipeline.checkpoints.local import latest_checkpoint
from pipeline.checkpoints.reference_format import read_classes, student_from_file
from pipeline.checkpoints.state import CheckpointState, load_weights, read_state
from pipeline.models import SiT, make_student
from schemas.classes import ClassTable
from schemas.diffusion import Path as DiffusionPath
from schemas.errors import UserError
from schemas.store import AutoencoderInfo


@dataclass(frozen=True)
class LoadedStudent:
    """A student and the facts that sampling needs."""

    student: SiT
    path: DiffusionPath
    encoder: AutoencoderInfo | None
    """Autoencoder of the training latents; None for a .pt file, which does not record it."""
    step: int | None
    """Training step; None for a .pt file, which does not record it."""
    classes: ClassTable
    """Classes that the student was trained on, as far as the checkpoint records them."""


def load_trained_student(
    checkpoint: Path, weights: str = "ema", model: str | None = None
) -> LoadedStudent:
    """Load from the folder of a run or of one checkpoint, or from a .pt file of the SiT, REPA or
    HASTE repositories, whose architecture ``model`` names. Raises ``UserError``."""
    if is_weights_file(checkpoint):
        if model is None:
            raise UserError(
                f"--checkpoint '{checkpoint}' does not record its architecture: add --model, for "
                "example --model SiT-XL/2"
            )
        student = student_from_file(checkpoint, model, weights)
        classes = read_classes(checkpoint, student.config.num_classes)
        return LoadedStudent(student.requires_grad_(False).eval(), "linear", None, None, classes)
    if model is not None:
        raise UserError(
            f"--model is for a .pt file; --checkpoint '{checkpoint}' is a folder that says what "
            "it holds"
        )
    student, state = load_student(checkpoint, weights)
    path = state.config.diffusion.path
    return LoadedStudent(student, path, state.autoencoder, state.step, state.classes)


def load_student(folder: Path, weights: str = "ema") -> tuple[SiT, CheckpointState]:
    """Student and state of a checkpoint, or of the latest valid checkpoint of a run."""
    latest = latest_checkpoint(folder)
    if latest is None:
        raise UserError(f"--checkpoint '{folder}' holds no checkpoint")
    state = read_state(latest)
    student = make_student(state.config.student)
    load_weights(latest, weights, student)
    return student.requires_grad_(False).eval(), state


def is_weights_file(checkpoint: Path) -> bool:
    """True for a .pt file, False for the folder of a checkpoint or a run."""
    return checkpoint.is_file() or checkpoint.suffix in (".pt", ".pth")
