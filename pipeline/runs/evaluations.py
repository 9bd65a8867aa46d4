"""``evaluations.jsonl`` of a run: one row for each evaluation of its samples."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fsspec

from pipeline.storage.conditional import update_file
from pipeline.storage.files import (
    absolute_url,
    is_local,
    list_folder,
    open_url,
    read_bytes,
    redact,
)
from schemas.errors import UserError
from schemas.evaluate import RecordedEvaluation

EVALUATIONS = "evaluations.jsonl"

IDENTITY = (
    "step",
    "weights",
    "network",
    "network_identity",
    "samples",
    "reference_sha256",
    "sampling",
)
"""Keys that are equal in two rows if the later replaces the earlier."""


def check_run(run: str) -> None:
    """Raises ``UserError`` if the run does not exist or its rows cannot be read."""
    filesystem, root = open_url(absolute_url(run), what="--record")
    local = is_local(filesystem)
    exists = Path(root).is_dir() if local else bool(list_folder(filesystem, root))
    if not exists:
        raise UserError(
            f"--record '{redact(run)}': no such folder; name the folder of a training run"
        )
    _read_rows(filesystem, root)


def check_rows(folder: Path) -> None:
    """Raises ``UserError`` if existing rows cannot be read."""
    _read_rows(*open_url(absolute_url(str(folder)), what="--record"))


def find_evaluation(folder: Path, evaluation: RecordedEvaluation) -> dict[str, Any] | None:
    """The row that ``evaluation`` would replace and that has the same weights, or None. Raises
    ``UserError``."""
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
    """Add rows to a run's evaluations, ordered by step.

    A run and any number of ``jobs/evaluate.py --record`` may add rows at once: none is lost. Raises
    ``UserError``.
    """

    def add(data: bytes | None) -> bytes:
        present = _parse_rows(data or b"", _where(filesystem, root))
        rows = [one for one in present if not any(_replaces(row, one) for row in new)]
        rows = sorted([*rows, *new], key=lambda one: int(one["step"]))
        return "".join(json.dumps(one, allow_nan=False) + "\n" for one in rows).encode()

    update_file(filesystem, f"{root}/{EVALUATIONS}", add)


def _replaces(new: dict[str, Any], old: dict[str, Any]) -> bool:
    """True if both rows are the same kind of evaluation at the same step. Rows of earlier versions
    lack the keys of ``IDENTITY`` and are not replaced."""
    known = new.get("reference_sha256") is not None
    return new == old or (known and all(new.get(key) == old.get(key) for key in IDENTITY))


def _refuse_constant(name: str) -> None:
    """Refuse NaN and infinity, which are not JSON."""
    raise ValueError(name)


def _read_rows(filesystem: fsspec.AbstractFileSystem, root: str) -> list[dict[str, Any]]:
    where = _where(filesystem, root)
    try:
        data = read_bytes(filesystem, f"{root}/{EVALUATIONS}")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"'{where}' cannot be read ({error.strerror})") from None
    return _parse_rows(data, where)


def _where(filesystem: fsspec.AbstractFileSystem, root: str) -> str:
    path = f"{root}/{EVALUATIONS}"
    return path if is_local(filesystem) else str(filesystem.unstrip_protocol(path))


def _parse_rows(data: bytes, where: str) -> list[dict[str, Any]]:
    try:
        lines = data.decode().splitlines()
    except UnicodeDecodeError:
        raise UserError(f"'{where}' cannot be read (not text)") from None
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line, parse_constant=_refuse_constant)
            if type(row["step"]) is not int:
                raise TypeError
        except (ValueError, TypeError, KeyError, RecursionError):
            raise UserError(
                f"line {number} of '{where}' is not an evaluation; repair or remove it"
            ) from None
        rows.append(row)
    return rows
