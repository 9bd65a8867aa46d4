"""What a person does after a disturbance, with the commands that there are for it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.store.layout import commit_path
from tests.faults.faults import Scene
from tests.faults.habitats import ROOT
from tests.faults.limits import END_SECONDS, BrokenError, HungError


def mend(scene: Scene, environment: Mapping[str, str]) -> bool:
    """Where files of a store were damaged: find them, and delete what `--verify` says should be
    deleted. Returns whether there was anything."""
    if not scene.damaged:
        return False
    found = _inspect(scene.work.target, environment, "--verify")
    scene.damaged = False
    records = {commit_path(d["shard"]) for d in found["damaged"] if d["shard"] is not None}
    for record in records:
        (Path(scene.work.target) / record).unlink(missing_ok=True)
    return bool(found["damaged"])


def collect_garbage(store: str, environment: Mapping[str, str]) -> None:
    _inspect(store, environment, "--gc", "--gc-age", "0")


def _inspect(store: str, environment: Mapping[str, str], *question: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "pipeline.inspect", store, *question, "--json"]
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=dict(environment),
            capture_output=True,
            text=True,
            timeout=END_SECONDS,
        )
    except subprocess.TimeoutExpired:
        raise HungError(f"{' '.join(command[1:])}: still not after {END_SECONDS:.0f} s") from None
    if done.returncode not in (0, 1):
        raise BrokenError(f"{' '.join(command[1:])} failed: {done.stderr[-500:]}")
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer
