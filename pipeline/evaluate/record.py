"""Evaluations beside the run whose samples they are of."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec

from pipeline.evaluate.networks import Network
from pipeline.evaluate.statistics import Moments
from pipeline.hashing import sha256_of_arrays
from pipeline.storage.files import (
    absolute_url,
    is_local,
    list_folder,
    open_url,
    read_bytes,
    without_credentials,
    write_atomic,
)
from pipeline.storage.locks import turn_in
from schemas.errors import UserError
from schemas.evaluate import Evaluation, NetworkIdentity, RecordedEvaluation
from schemas.fields import DIGEST, text_or_digest
from schemas.sample import Sampling, Weights

EVALUATIONS = "evaluations.jsonl"
SAME = (
    "step",
    "weights",
    "network",
    "network_identity",
    "samples",
    "reference_sha256",
    "sampling",
)
"""What two rows have in common where the later replaces the earlier."""


@dataclass(frozen=True)
class Origin:
    """Where samples come from."""

    step: int
    weights: Weights
    weights_sha256: str | None
    """Of the student's, all of it; None where samples do not say."""
    sampling: Sampling | None
    """None where they do not say."""
    decoder: str | None
    """Name of the autoencoder."""


def recorded(
    numbers: Evaluation, origin: Origin, network: Network, reference: Moments, place: str
) -> RecordedEvaluation:
    """The row of ``numbers``, of samples against the ``reference`` at ``place``."""
    decoder = origin.decoder
    return RecordedEvaluation(
        **numbers.model_dump(),
        step=origin.step,
        weights=origin.weights,
        weights_sha256=None if origin.weights_sha256 is None else origin.weights_sha256[:DIGEST],
        network_identity=_identity(network),
        reference=without_credentials(place),
        reference_sha256=digest_of(reference),
        sampling=origin.sampling,
        decoder=None if decoder is None else without_credentials(decoder),
    )


def check_run(run: str) -> None:
    """Raises ``UserError`` where there is no such run, or its rows cannot be read."""
    filesystem, root = open_url(absolute_url(run), what="--record")
    there = Path(root).is_dir() if is_local(filesystem) else bool(list_folder(filesystem, root))
    if not there:
        raise UserError(
            f"--record '{without_credentials(run)}': no such folder; name that of a training run"
        )
    _read_rows(filesystem, root)


def check_rows(folder: Path) -> None:
    """Raises ``UserError`` where there are rows that cannot be read."""
    _read_rows(*open_url(absolute_url(str(folder)), what="--record"))


def find_evaluation(folder: Path, evaluation: RecordedEvaluation) -> dict[str, Any] | None:
    """The row of the same kind of evaluation, step and weights. Raises ``UserError``."""
    row = evaluation.model_dump(mode="json")
    rows = _read_rows(*open_url(absolute_url(str(folder)), what="--record"))
    of_weights = [one for one in rows if one.get("weights_sha256") == row["weights_sha256"]]
    return next((one for one in of_weights if _replaces(row, one)), None)


def record_evaluation(run: str | Path, evaluation: RecordedEvaluation) -> dict[str, Any]:
    """Add a row to the evaluations of the run at a path or URL, and return it. Raises
    ``UserError``."""
    row = evaluation.model_dump(mode="json")
    add_rows(*open_url(absolute_url(str(run)), what="--record"), [row])
    return row


def add_rows(
    filesystem: fsspec.AbstractFileSystem, root: str, new: Sequence[dict[str, Any]]
) -> None:
    """Add rows to a run's evaluations, ordered by step. A run and any number of ``jobs/evaluate.py
    --record`` may do so at once. An object store has no locks: there, what is there is read just
    before it is written, and of two that write at the same moment one row is lost. Raises
    ``UserError``."""
    with turn_in(Path(root)) if is_local(filesystem) else nullcontext():
        there = _read_rows(filesystem, root)
        rows = [one for one in there if not any(_replaces(row, one) for row in new)]
        rows = sorted([*rows, *new], key=lambda one: int(one["step"]))
        text = "".join(json.dumps(one, allow_nan=False) + "\n" for one in rows)
        write_atomic(filesystem, f"{root}/{EVALUATIONS}", text.encode())


def _replaces(new: dict[str, Any], old: dict[str, Any]) -> bool:
    """Whether both are of the same kind of evaluation at the same step. Rows of earlier versions,
    which do not say what kind they are, stay."""
    known = new.get("reference_sha256") is not None
    return new == old or (known and all(new.get(key) == old.get(key) for key in SAME))


def _identity(network: Network) -> NetworkIdentity:
    said = network.identity
    arguments = said.get("arguments") or {}
    return NetworkIdentity(
        size=said["size"],
        weights_sha256=said["weights_sha256"][:DIGEST],
        arguments=text_or_digest(json.dumps(arguments, sort_keys=True)) if arguments else "",
    )


def digest_of(moments: Moments) -> str:
    """What rows say of a reference: a digest of the numbers of a file of --save-reference."""
    parts = {"mu": moments.mean, "sigma": moments.covariance}
    whole = sha256_of_arrays((name, part.cpu().numpy()) for name, part in parts.items())
    return whole[:DIGEST]


def _no_number(name: str) -> None:
    """NaN and infinity, which are not JSON and could not be written again."""
    raise ValueError(name)


def _read_rows(filesystem: fsspec.AbstractFileSystem, root: str) -> list[dict[str, Any]]:
    where = (
        f"{root}/{EVALUATIONS}"
        if is_local(filesystem)
        else filesystem.unstrip_protocol(f"{root}/{EVALUATIONS}")
    )
    try:
        lines = read_bytes(filesystem, f"{root}/{EVALUATIONS}").decode().splitlines()
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not text"
        raise UserError(f"'{where}' cannot be read ({reason})") from None
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line, parse_constant=_no_number)
            if type(row["step"]) is not int:
                raise TypeError
        except (ValueError, TypeError, KeyError, RecursionError):
            raise UserError(
                f"line {number} of '{where}' is no evaluation; repair or remove it"
            ) from None
        rows.append(row)
    return rows
