"""``evaluations.jsonl`` of a run: one row for each evaluation of its samples."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import fsspec

from pipeline.storage.files import (
    absolute_url,
    is_local,
    list_folder,
    open_url,
    read_bytes,
    redact,
    write_atomic,
)
from pipeline.storage.locks import wait_lock
from schemas.errors import UserError
from schemas.evaluate import RecordedEvaluation

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


def check_run(run: str) -> None:
    """Raises ``UserError`` where there is no such run, or its rows cannot be read."""
    filesystem, root = open_url(absolute_url(run), what="--record")
    there = Path(root).is_dir() if is_local(filesystem) else bool(list_folder(filesystem, root))
    if not there:
        raise UserError(f"--record '{redact(run)}': no such folder; name that of a training run")
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
    with wait_lock(Path(root)) if is_local(filesystem) else nullcontext():
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
