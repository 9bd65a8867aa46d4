"""The same measurement in this and in another checkout of the project."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from schemas.errors import UserError

HERE = Path(__file__).parents[2]


def run_in(checkout: Path, arguments: list[str], *, option: str = "--baseline") -> Any:
    """The JSON in the last line of ``python ARGUMENTS`` with the packages of a checkout."""
    if not (checkout / "pipeline").is_dir():
        raise UserError(f"{option} '{checkout}': not a checkout of this project")
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    command = [sys.executable, *arguments]
    done = subprocess.run(
        command, cwd=checkout, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"{option} '{checkout}' cannot be measured: {last[:200]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def peak_megabytes() -> float:
    """Largest resident memory of this process so far."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
