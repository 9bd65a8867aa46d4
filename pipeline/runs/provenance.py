"""Provenance of samples: only a run's own samples may be recorded among its evaluations."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from safetensors import SafetensorError, safe_open

from pipeline.checkpoints.integrity import part_paths
from pipeline.checkpoints.resolve import holds_weights, local_copy
from pipeline.checkpoints.selection import checkpoint_name, is_weights_file
from pipeline.hashing import sha256_of_arrays
from pipeline.storage.files import absolute_url, is_local, open_url, redact
from schemas.errors import UserError, plain_text
from schemas.sample import SampleAbout


def check_samples_are_of(run: str, info: SampleAbout, step: int) -> None:
    """Raises ``UserError`` if samples described by ``info`` are not of ``run`` (a folder or URL) at
    ``step``.

    If the run has its checkpoint of that step, the checksum of its weights decides, so that a run
    may be moved or copied. For a remote run, where this is a download, the checksum is compared
    only if the recorded place of the checkpoint is not this run. Without the checkpoint, names
    decide: the recorded place must be this folder, or one of the same name that does not exist any
    more. A .pt file does not name its run and is accepted.
    """
    url = absolute_url(run.rstrip("/"))
    filesystem, root = open_url(url, what="--record")
    local, shown = is_local(filesystem), redact(run)
    name = checkpoint_name(step)
    recorded, _, _ = info.checkpoint.rpartition("/")
    same_place = recorded == (root if local else redact(url))
    if (local or not same_place) and holds_weights(filesystem, f"{root}/{name}", info.weights):
        place = f"{root}/{name}" if local else f"{url}/{name}"
        with local_copy(place, info.weights) as folder:
            if _digest(folder, f"{info.weights}.safetensors") != info.weights_sha256:
                raise UserError(
                    f"--record '{shown}': the samples were not drawn from the '{info.weights}' "
                    f"weights of its {name} but from other ones ('{info.checkpoint}'); name the "
                    "run that they belong to, or draw them again"
                )
        return
    if same_place or is_weights_file(Path(info.checkpoint)):
        return
    source = Path(recorded)
    moved = source.name == Path(root).resolve().name and not source.exists()
    if not moved and not (local and source.resolve() == Path(root).resolve()):
        raise UserError(
            f"--record '{shown}': the samples are recorded as those of '{info.checkpoint}', and "
            f"this run has no {name} to compare with; name the run that they belong to"
        )


def _digest(folder: Path, weights: str) -> str:
    """SHA-256 of weights of a checkpoint, as in ``SampleAbout``; one tensor in memory at a time."""
    try:
        with ExitStack() as stack:
            files = [
                stack.enter_context(safe_open(path, "pt")) for path in part_paths(folder, weights)
            ]
            holders = {name: file for file in files for name in file.keys()}  # noqa: SIM118
            return sha256_of_arrays(
                (name, holders[name].get_tensor(name).numpy()) for name in sorted(holders)
            )
    except (SafetensorError, OSError) as error:
        reason = plain_text(str(error))[:200]
        raise UserError(f"--record: '{folder / weights}' cannot be read: {reason}") from None
