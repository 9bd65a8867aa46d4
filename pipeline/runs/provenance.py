"""Whether samples are of a run: an evaluation of others must not stand among its own."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open

from pipeline.checkpoints.resolve import local_copy
from pipeline.checkpoints.selection import checkpoint_name
from pipeline.checkpoints.student import is_weights_file
from pipeline.hashing import sha256_of_arrays
from pipeline.storage.files import absolute_url, exists, is_local, open_url, redact
from schemas.errors import UserError
from schemas.sample import SampleAbout


def check_samples_are_of(run: str, about: SampleAbout, step: int) -> None:
    """Raises ``UserError`` where samples that say ``about`` are not of the run in this folder or at
    this URL, at ``step``.

    While the run has its checkpoint of that step, the weights' checksum decides, so that a folder
    may be moved or copied; far away, where that is a download, only if the samples do not say that
    their checkpoint lay there. Where it is gone names are left: the samples' checkpoint must have
    lain in this folder, or in one of the same name that is not there any more. A .pt file names no
    run: it is taken at the word of whoever gave ``step``.
    """
    url = absolute_url(run.rstrip("/"))
    filesystem, root = open_url(url, what="--record")
    near, shown = is_local(filesystem), redact(run)
    name = checkpoint_name(step)
    weights = f"{root}/{name}/{about.weights}.safetensors"
    told, _, _ = about.checkpoint.rpartition("/")
    same_place = told == (root if near else redact(url))
    if (near or not same_place) and exists(filesystem, weights):
        place = f"{root}/{name}" if near else f"{url}/{name}"
        with local_copy(place, about.weights) as folder:
            if _digest(folder / f"{about.weights}.safetensors") != about.weights_sha256:
                raise UserError(
                    f"--record '{shown}': the samples were not drawn from the '{about.weights}' "
                    f"weights of its {name} but from other ones ('{about.checkpoint}'); name the "
                    "run that they are of, or draw them anew"
                )
        return
    if same_place or is_weights_file(Path(about.checkpoint)):
        return
    theirs = Path(told)
    moved = theirs.name == Path(root).resolve().name and not theirs.exists()
    if not moved and not (near and theirs.resolve() == Path(root).resolve()):
        raise UserError(
            f"--record '{shown}': the samples say that they are of '{about.checkpoint}', and this "
            f"run has no {name} whose weights could show otherwise; name the run that they are of"
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
