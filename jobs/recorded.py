"""`jobs/evaluate.py --record URL`: the evaluations of a run on an object store."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import fsspec

from pipeline.evaluate.record import EVALUATIONS, check_rows, record_evaluation
from pipeline.files import (
    is_local,
    list_folder,
    open_url,
    read_bytes,
    without_credentials,
    write_atomic,
)
from schemas.errors import UserError


@contextmanager
def recorded(record: str | None) -> Iterator[str | None]:
    """A local folder for what ``--record`` names: its own, or one whose rows are added to those of
    a run far away when the context ends well. Raises ``UserError`` where there is no such run, or
    its rows cannot be read, before the work that it would lose."""
    if record is None or "://" not in record:
        yield record
        return
    filesystem, root = open_url(record, what="--record")
    if is_local(filesystem):
        yield root
        return
    shown = without_credentials(record.rstrip("/"))
    if not list_folder(filesystem, root):
        raise UserError(f"--record '{shown}': no such folder; name that of a training run")
    with tempfile.TemporaryDirectory(prefix="haste-record-") as scratch:
        _fetch(filesystem, root, Path(scratch) / "before", shown)
        new = Path(scratch) / "new"
        new.mkdir()
        yield str(new)
        # the run may have written rows of its own meanwhile
        copy = _fetch(filesystem, root, Path(scratch) / "after", shown)
        for line in (new / EVALUATIONS).read_text().splitlines():
            record_evaluation(copy, json.loads(line))
        write_atomic(filesystem, f"{root}/{EVALUATIONS}", (copy / EVALUATIONS).read_bytes())


def _fetch(filesystem: fsspec.AbstractFileSystem, root: str, copy: Path, shown: str) -> Path:
    """The run's rows, if it has any, in the new folder ``copy``."""
    copy.mkdir()
    try:
        (copy / EVALUATIONS).write_bytes(read_bytes(filesystem, f"{root}/{EVALUATIONS}"))
    except FileNotFoundError:
        return copy
    try:
        check_rows(copy)
    except UserError as error:
        raise UserError(str(error).replace(str(copy), shown)) from None
    return copy
