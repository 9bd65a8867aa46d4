"""Evaluations beside the run whose samples they are of."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.evaluate.networks import Network
from pipeline.evaluate.statistics import Moments
from pipeline.files import open_url, sha256_of_arrays, without_credentials, write_atomic
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
"""What two rows have in common where the later replaces the earlier. Rows of earlier versions lack
some of it, and are kept."""


@dataclass(frozen=True)
class Origin:
    """Where samples come from."""

    step: int
    weights: Weights
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
        network_identity=_identity(network),
        reference=without_credentials(place),
        reference_sha256=_digest(reference),
        sampling=origin.sampling,
        decoder=None if decoder is None else without_credentials(decoder),
    )


def check_run(folder: Path) -> None:
    """Raises ``UserError`` where there is no such folder, or its rows cannot be read."""
    if not folder.is_dir():
        raise UserError(f"--record '{folder}': no such folder; name that of a training run")
    check_rows(folder)


def check_rows(folder: Path) -> None:
    """Raises ``UserError`` where there are rows that cannot be read."""
    _read_rows(folder / EVALUATIONS)


def record_evaluation(folder: Path, evaluation: RecordedEvaluation) -> dict[str, Any]:
    """Add a row to the run's evaluations, ordered by step, and return it. Raises ``UserError``."""
    path = folder / EVALUATIONS
    row = evaluation.model_dump(mode="json")
    rows = [one for one in _read_rows(path) if any(one.get(key) != row[key] for key in SAME)]
    rows.append(row)
    rows.sort(key=lambda one: int(one["step"]))
    text = "".join(json.dumps(one, allow_nan=False) + "\n" for one in rows)
    filesystem, root = open_url(str(folder.absolute()), what="--record")
    write_atomic(filesystem, f"{root}/{EVALUATIONS}", text.encode())
    return row


def find_evaluation(folder: Path, evaluation: RecordedEvaluation) -> dict[str, Any] | None:
    """The row that ``evaluation`` would replace. Raises ``UserError``."""
    row = evaluation.model_dump(mode="json")
    rows = _read_rows(folder / EVALUATIONS)
    return next((one for one in rows if all(one.get(key) == row[key] for key in SAME)), None)


def _identity(network: Network) -> NetworkIdentity:
    said = network.identity
    arguments = said.get("arguments") or {}
    return NetworkIdentity(
        size=said["size"],
        weights_sha256=said["weights_sha256"][:DIGEST],
        arguments=text_or_digest(json.dumps(arguments, sort_keys=True)) if arguments else "",
    )


def _digest(moments: Moments) -> str:
    """Of the numbers as they stand in a file of --save-reference."""
    parts = {"mu": moments.mean, "sigma": moments.covariance}
    whole = sha256_of_arrays((name, part.cpu().numpy()) for name, part in parts.items())
    return whole[:DIGEST]


def _read_rows(path: Path) -> list[dict[str, Any]]:
    try:
        lines = path.read_text().splitlines()
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not text"
        raise UserError(f"'{path}' cannot be read ({reason})") from None
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            if type(row["step"]) is not int:
                raise TypeError
        except (ValueError, TypeError, KeyError, RecursionError):
            raise UserError(
                f"line {number} of '{path}' is no evaluation; repair or remove it"
            ) from None
        rows.append(row)
    return rows
