"""Whether samples are of a run: an evaluation of others must not stand among its own."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open

from pipeline.files import sha256_of_arrays
from pipeline.train.choose import checkpoint_name
from schemas.errors import UserError
from schemas.sample import SampleAbout


def check_samples_are_of(run: Path, about: SampleAbout, step: int) -> None:
    """Raises ``UserError`` where samples that say ``about`` are not of the run in this folder, at
    ``step``.

    While the run has its checkpoint of that step, the weights' checksum decides, so that a folder
    may be moved or copied. Where that is gone only names are left: the samples' checkpoint must
    have lain in this folder, or in one of the same name that is not there any more. A .pt file
    names no run: it is taken at the word of whoever gave ``step``.
    """
    checkpoint = run / checkpoint_name(step)
    weights = checkpoint / f"{about.weights}.safetensors"
    if weights.exists():
        if _digest(weights) != about.weights_sha256:
            raise UserError(
                f"--record '{run}': the samples were not drawn from the '{about.weights}' weights "
                f"of its {checkpoint.name} but from other ones ('{about.checkpoint}'); name the "
                "run that they are of, or draw them anew"
            )
        return
    told = Path(about.checkpoint)
    if told.suffix in (".pt", ".pth"):
        return
    theirs = told.parent
    moved = theirs.name == run.resolve().name and not theirs.exists()
    if theirs.resolve() != run.resolve() and not moved:
        raise UserError(
            f"--record '{run}': the samples say that they are of '{about.checkpoint}', and this "
            f"run has no {checkpoint.name} whose weights could show otherwise; name the run that "
            "they are of"
        )


def _digest(weights: Path) -> str:
    """As ``SampleAbout`` has it of the same weights; one tensor in memory at a time."""
    try:
        with safe_open(weights, "pt") as file:
            return sha256_of_arrays(
                (name, file.get_tensor(name).numpy()) for name in sorted(file.keys())
            )
    except (SafetensorError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"--record: '{weights}' cannot be read: {reason}") from None
