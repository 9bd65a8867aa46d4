"""A student from a checkpoint, and what is needed to draw from it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pipeline.checkpoints.local import latest_checkpoint
from pipeline.checkpoints.reference_format import student_from_file
from pipeline.checkpoints.state import CheckpointState, load_weights, read_state
from pipeline.models import SiT, make_student
from schemas.diffusion import Path as DiffusionPath
from schemas.errors import UserError
from schemas.store import AutoencoderInfo


@dataclass(frozen=True)
class LoadedStudent:
    """A student, and what is needed to draw from it."""

    student: SiT
    path: DiffusionPath
    encoder: AutoencoderInfo | None
    """What made the latents that it was trained on; None where a .pt file does not say."""
    step: int | None
    """Of the training; None where a .pt file does not say."""


def load_trained_student(
    checkpoint: Path, weights: str = "ema", model: str | None = None
) -> LoadedStudent:
    """A run's folder or one checkpoint's; or a file of the SiT, REPA or HASTE repositories, of
    which only the asker knows that it is a ``model``. Raises ``UserError``."""
    if is_weights_file(checkpoint):
        if model is None:
            raise UserError(
                f"--checkpoint '{checkpoint}' does not say what it is: add --model, for example "
                "--model SiT-XL/2"
            )
        student = student_from_file(checkpoint, model, weights)
        return LoadedStudent(student.requires_grad_(False).eval(), "linear", None, None)
    if model is not None:
        raise UserError(
            f"--model is for a .pt file; --checkpoint '{checkpoint}' is a folder that says what "
            "it holds"
        )
    student, state = load_student(checkpoint, weights)
    return LoadedStudent(student, state.config.diffusion.path, state.autoencoder, state.step)


def load_student(folder: Path, weights: str = "ema") -> tuple[SiT, CheckpointState]:
    """The student of a checkpoint, or of a run's newest one, and the checkpoint's state."""
    newest = latest_checkpoint(folder)
    if newest is None:
        raise UserError(f"--checkpoint '{folder}' holds no checkpoint")
    state = read_state(newest)
    student = make_student(state.config.student)
    load_weights(newest, weights, student)
    return student.requires_grad_(False).eval(), state


def is_weights_file(checkpoint: Path) -> bool:
    """Whether that is a .pt file, not the folder of a checkpoint or of a run."""
    return checkpoint.is_file() or checkpoint.suffix in (".pt", ".pth")
