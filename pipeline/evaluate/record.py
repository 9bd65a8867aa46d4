"""Evaluations beside the run whose samples they are of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pipeline.files import open_url, write_atomic
from schemas.errors import UserError

EVALUATIONS = "evaluations.jsonl"
SAME = ("step", "network", "samples", "weights", "reference")
"""What two rows have in common where the later replaces the earlier."""


def check_run(folder: Path) -> None:
    """Raises ``UserError`` where there is no such folder, or its rows cannot be read."""
    if not folder.is_dir():
        raise UserError(f"--record '{folder}': no such folder; name that of a training run")
    check_rows(folder)


def check_rows(folder: Path) -> None:
    """Raises ``UserError`` where there are rows that cannot be read."""
    _read_rows(folder / EVALUATIONS)


def record_evaluation(folder: Path, row: dict[str, Any]) -> None:
    """Add a row to the run's evaluations, ordered by step. Raises ``UserError``."""
    path = folder / EVALUATIONS
    rows = [one for one in _read_rows(path) if any(one.get(key) != row[key] for key in SAME)]
    rows.append(row)
    rows.sort(key=lambda one: int(one["step"]))
    text = "".join(json.dumps(one, allow_nan=False) + "\n" for one in rows)
    filesystem, root = open_url(str(folder.absolute()), what="--record")
    write_atomic(filesystem, f"{root}/{EVALUATIONS}", text.encode())


def find_evaluation(folder: Path, row: dict[str, Any]) -> dict[str, Any] | None:
    """The row that ``row`` would replace. Raises ``UserError``."""
    rows = _read_rows(folder / EVALUATIONS)
    return next((one for one in rows if all(one.get(key) == row[key] for key in SAME)), None)


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
