"""Repair of a disturbed store with the commands that users have for it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.store.layout import commit_path
from tests.faults.environments import ROOT
from tests.faults.faults import FaultContext
from tests.faults.timeouts import END_SECONDS, RunFailedError, WaitTimeoutError


def repair(context: FaultContext, variables: Mapping[str, str]) -> bool:
    """Delete the commit records of shards that `--verify` reports as damaged, where files of the
    store were damaged. Returns True where any damage was reported."""
    if not context.damaged:
        return False
    found = _inspect(context.work.target, variables, "--verify")
    context.damaged = False
    records = {commit_path(d["shard"]) for d in found["damaged"] if d["shard"] is not None}
    for record in records:
        (Path(context.work.target) / record).unlink(missing_ok=True)
    return bool(found["damaged"])


def collect_garbage(store: str, variables: Mapping[str, str]) -> None:
    _inspect(store, variables, "--gc", "--gc-age", "0")


def _inspect(store: str, variables: Mapping[str, str], *options: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "pipeline.inspect", store, *options, "--json"]
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=dict(variables),
            capture_output=True,
            text=True,
            timeout=END_SECONDS,
        )
    except subprocess.TimeoutExpired:
        raise WaitTimeoutError(
            f"{' '.join(command[1:])}: not finished after {END_SECONDS:.0f} s"
        ) from None
    if done.returncode not in (0, 1):
        raise RunFailedError(f"{' '.join(command[1:])} failed: {done.stderr[-500:]}")
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer
