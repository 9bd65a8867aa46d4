"""`python -m tests.cluster --folder FOLDER [--losses N] [--seed S] [--json]`."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import sys
import tempfile
import uuid
from dataclasses import asdict
from pathlib import Path

from pipeline.cli.command import run_command
from pipeline.cli.options import parse_options
from schemas.errors import UserError
from tests.cluster.options import DrillOptions


def main(argv: list[str]) -> int:
    options = parse_options(
        DrillOptions,
        argv,
        command="python -m tests.cluster",
        about="Lose nodes of an emulated cluster at random, with and without notice, while others "
        "join one elastic run, and compare its losses and weights with an undisturbed run's.",
    )
    if options.folder is None:
        raise UserError("--folder is missing: the folder to work in")
    folder = Path(options.folder).absolute()
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"--folder '{options.folder}' is not empty")
    folder.mkdir(parents=True, exist_ok=True)
    logging.getLogger("pipeline").setLevel(logging.WARNING)  # a line for each step
    counts = drill(options, folder)
    problems = counts["problems"]
    if options.as_json:
        print(json.dumps(counts))
    else:
        print("\n".join(f"{name.replace('_', ' '):16} {value}" for name, value in counts.items()))
    return 1 if problems else 0


def drill(options: DrillOptions, folder: Path) -> dict[str, object]:
    """Make the store, start the cluster and play the drill. Returns its counts."""
    os.environ["RAY_AUTH_MODE"] = "disabled"  # before Ray is imported
    from pipeline.extract.job import extract  # torch takes seconds to import
    from tests.bench.scaling_commands import extraction
    from tests.cluster.drill import run_drill
    from tests.cluster.emulation import EmulatedCluster
    from tests.cluster.network import Loopback, Namespaces, unavailable
    from tests.faults.environments import process_variables
    from tests.faults.processes import kill_all

    reason = unavailable() if options.network != "loopback" else "--network loopback"
    if reason and options.network == "namespaces":
        raise UserError(f"--network namespaces: {reason}")
    if reason:
        print(f"no network namespaces, so no slow links: {reason}", file=sys.stderr)
    options = options.model_copy(update={"disk": _disk(options, folder)})
    extract(extraction(folder, 1))
    # after the extraction, which replaces the handler: nodes, namespaces and the disk would stay
    signal.signal(signal.SIGTERM, _interrupt)
    mark = uuid.uuid4().hex
    ray_folder = Path(tempfile.mkdtemp(prefix="hc-", dir="/tmp"))  # short socket paths
    variables = process_variables(mark, folder, ray_folder)
    variables |= {"OMP_NUM_THREADS": "1", "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1"}
    # Ray's own take a minute to miss a node whose link is gone with it
    checks = {"period_ms": 1000, "timeout_ms": 6000, "failure_threshold": 3}
    variables |= {f"RAY_health_check_{name}": str(value) for name, value in checks.items()}
    # after a notice Ray 2.60 waits so long for workers of the node that has gone
    variables |= {"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "20"}
    try:
        network = Loopback() if reason else Namespaces()
        with EmulatedCluster(folder, variables, network) as cluster:
            return asdict(run_drill(options, cluster, mark, folder))
    finally:
        kill_all(mark)
        shutil.rmtree(ray_folder, ignore_errors=True)


def _disk(options: DrillOptions, folder: Path) -> str:
    from tests.faults.environments import mount, unmount

    if options.disk != "auto":
        return options.disk
    place = folder / "probe"
    place.mkdir()
    try:
        mount(place)
        unmount(place)
    except OSError as error:
        print(f"no small disk, so no full ones: {error}", file=sys.stderr)
        return "plain"
    return "small"


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    run_command(main)
