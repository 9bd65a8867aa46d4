"""A run that loses nodes, with and without notice, while others join, and what it must equal."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file

from pipeline.checkpoints.local import LocalCheckpoints, latest_checkpoint
from pipeline.checkpoints.state import read_state
from pipeline.cli.config_files import merge
from pipeline.runs.directory import METRICS
from pipeline.runs.metrics import read_metrics
from pipeline.train.loop import train
from schemas.run import RunConfig
from tests.cluster.emulation import ROOT, EmulatedCluster, Node
from tests.cluster.options import DrillOptions
from tests.faults.environments import SmallDisk
from tests.faults.processes import pids_with_title
from tests.faults.timeouts import SETTLE_SECONDS, HarnessError, RunFailedError, wait_for
from tests.faults.workloads import words
from tests.processes import train_on

BATCH = 12
EVERY = 20
"""Steps between checkpoints."""
AFTER = 10
"""Steps after the last event."""
LOSS_TOLERANCE = 2e-3
WEIGHT_TOLERANCE = 2e-3
"""Greatest difference of a loss, and of the weights in the L2 norm, in relation to the undisturbed
run's, which one process trains: sums over another number of workers differ in their last bits."""
ROUNDING_FACTOR = 3.0
LARGEST_DIFFERENCE = 0.1
"""Allowed beside it, because such differences grow with the steps: so many times that of an
undisturbed run of two processes. More than a tenth is never rounding."""
RECOVERY_SECONDS = 600.0
WORKER = "RayTrainWorker"
Row = Mapping[str, Any]
"""A row of the metrics."""


@dataclass
class Drill:
    """Counts of a drill, and what was wrong."""

    losses: int = 0
    noticed: int = 0
    joins: int = 0
    saved_in_time: int = 0
    """Notices that were followed by a checkpoint of that step or a later one before the end."""
    slow_links: int = 0
    full_disks: int = 0
    workers: dict[int, int] = field(default_factory=dict)
    """Number of workers -> events before which the run had it."""
    steps: int = 0
    samples: int = 0
    missing_steps: int = 0
    repeated_steps: int = 0
    worst_loss: float = 0.0
    weights: float = 0.0
    rounding_loss: float = 0.0
    rounding_weights: float = 0.0
    """The same of an undisturbed run of two processes."""
    seconds: float = 0.0
    problems: list[str] = field(default_factory=list)


class DrilledRun:
    """The command of one elastic run on an emulated cluster, and its folder."""

    def __init__(
        self, cluster: EmulatedCluster, config: RunConfig, mark: str, folder: Path
    ) -> None:
        self.cluster = cluster
        self.config = config
        self.mark = mark
        self.folder = Path(config.output) / config.name
        self.log = folder / "driver.log"
        self.file = folder / "run.yaml"
        self.file.write_text(yaml.safe_dump(config.model_dump(mode="json", exclude_unset=True)))

    def start(self, steps: int) -> None:
        options = {"config": self.file, "steps": steps, "ray-address": self.cluster.address}
        command = [sys.executable, "-m", "tests.cluster.train_command", *words(options)]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=self.cluster.variables,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def step(self) -> int:
        """Step of the last row of the metrics, which a restart may take back."""
        return max((row["step"] for row in self.rows()), default=0)

    def rows(self) -> list[dict[str, Any]]:
        return rows_of(self.folder)

    def saved(self) -> int:
        with suppress(Exception):  # one that is removed at this moment
            newest = latest_checkpoint(self.folder)
            return read_state(newest).step if newest else 0
        return 0

    def wait(self, happened: Callable[[], bool], event: str) -> None:
        def ended_or() -> bool:
            if self.process.poll() is not None:
                end = self.log.read_text()[-3000:]
                raise RunFailedError(f"{event}: the command ended ({self.process.poll()})\n{end}")
            return happened()

        wait_for(ended_or, RECOVERY_SECONDS, event)

    def trains_beyond(self, step: int) -> None:
        self.wait(lambda: self.step() > step, f"progress beyond step {step}")


def run_drill(options: DrillOptions, cluster: EmulatedCluster, mark: str, folder: Path) -> Drill:
    """Play the events on ``cluster``; the store ``folder/store`` exists."""
    drill, rng = Drill(), random.Random(options.seed)
    began = time.monotonic()
    with ExitStack() as stack:
        output, disk = folder / "runs", None
        if options.disk == "small":
            (folder / "disk").mkdir()
            disk = SmallDisk(folder / "disk", {})
            stack.enter_context(disk)
            output = Path(disk.url)
        config = drill_config(folder / "store", output, options.nodes)
        run = DrilledRun(cluster, config, mark, folder)
        cluster.join(options.nodes)
        run.start(1_000_000)
        stack.callback(run.kill)
        try:
            _play(run, drill, rng, disk, options)
        except (RunFailedError, HarnessError, subprocess.TimeoutExpired) as error:
            drill.problems.append(str(error))
            return drill
        finally:
            drill.seconds = time.monotonic() - began
        judge(run, drill, folder / "undisturbed")
    return drill


def _play(
    run: DrilledRun,
    drill: Drill,
    rng: random.Random,
    disk: SmallDisk | None,
    options: DrillOptions,
) -> None:
    """Lose the nodes, end the run by SIGTERM and let it train to its end."""
    cluster, began = run.cluster, time.monotonic()
    run.wait(lambda: run.saved() > 0, "the first checkpoint")
    while drill.losses < options.losses:
        if options.minutes is not None and time.monotonic() - began > 60 * options.minutes:
            break
        _lose_one(run, drill, rng, options)
        _play_extras(run, drill, rng, disk)
        print(_line(drill, run), file=sys.stderr, flush=True)
    _join(run, drill, options.nodes - len(cluster.nodes))
    run.process.terminate()
    code = run.process.wait(timeout=RECOVERY_SECONDS)
    if code != 143 or run.saved() < max(0, run.step()):
        drill.problems.append(f"SIGTERM: exit code {code}, checkpoint {run.saved()}")
    drill.steps = run.saved() + AFTER
    run.start(drill.steps)
    if run.process.wait(timeout=RECOVERY_SECONDS) != 0:
        raise RunFailedError(f"the last steps: {run.log.read_text()[-3000:]}")
    shutil.copytree(
        _newest(run.folder), run.log.parent / "final"
    )  # for inspection, after the disk is gone


def _join(run: DrilledRun, drill: Drill, count: int) -> None:
    run.cluster.join(count)
    drill.joins += count


def _lose_one(run: DrilledRun, drill: Drill, rng: random.Random, options: DrillOptions) -> None:
    cluster = run.cluster
    time.sleep(rng.uniform(0, 4))
    size = len(pids_with_title(run.mark, WORKER))
    drill.workers[size] = drill.workers.get(size, 0) + 1
    node = rng.choice(cluster.nodes)
    if (drill.losses + options.seed) % 2 == 0:
        _announce(run, drill, node, options.grace)
    cluster.lose(node)
    drill.losses += 1
    time.sleep(SETTLE_SECONDS)  # a step under way may still end
    before = run.step()
    joins = rng.choice([0, 1, 2])  # so that the number of nodes wanders
    joins = min(max(joins, 1 - len(cluster.nodes)), options.nodes - len(cluster.nodes))
    early = rng.random() < 0.5
    if not early and cluster.nodes:
        run.trains_beyond(before)
    _join(run, drill, joins)
    if early or not joins or not cluster.nodes:
        run.trains_beyond(max(before, run.saved()))
    else:
        last = run.step()
        run.trains_beyond(last + 2)


def _announce(run: DrilledRun, drill: Drill, node: Node, grace: float) -> None:
    """The notice of a node, its grace period, and the checkpoint that must be written in it."""
    drill.noticed += 1
    until = time.monotonic() + grace
    run.cluster.announce(node, grace)
    at = run.step()
    while time.monotonic() < until and run.saved() < at:
        time.sleep(0.1)
    if run.saved() >= at:
        drill.saved_in_time += 1
    else:
        drill.problems.append(f"no checkpoint of step {at} within {grace:g} s of a notice")
    time.sleep(max(0.0, until - time.monotonic()))


def _play_extras(run: DrilledRun, drill: Drill, rng: random.Random, disk: SmallDisk | None) -> None:
    """Now and then a slow link or a full disk, while the run trains."""
    if drill.losses % 4 == 1 and run.cluster.nodes:
        node = rng.choice(run.cluster.nodes)
        if run.cluster.network.slow(node.number, 50):
            drill.slow_links += 1
            run.trains_beyond(run.step() + 2)
            run.cluster.network.slow(node.number, 0)
    if disk is not None and drill.losses % 4 == 3:
        drill.full_disks += 1
        disk.fill(left=20_000)
        time.sleep(6)
        disk.free_space()
        run.trains_beyond(max(run.step(), run.saved()))


def drill_config(store: Path, output: Path, nodes: int) -> RunConfig:
    demo = yaml.safe_load((ROOT / "jobs" / "configs" / "demo.yaml").read_text())
    values = {
        "name": "drill",
        "store": str(store),
        "output": str(output),
        "global_batch": BATCH,
        "log_every": 1,
        "checkpoint": {"every": EVERY, "keep": 2},
        "alignment": {"termination": {"kind": "fixed", "step": 200}, "projector_width": 32},
        "workers": {"count": nodes, "min_count": 1, "cpus_per_worker": 1, "max_failures": -1},
    }
    return RunConfig.model_validate(merge(demo, values))


def judge(run: DrilledRun, drill: Drill, folder: Path) -> None:
    """Compare the run with an undisturbed one of one process, and that with one of two; both are
    trained in ``folder``."""
    torch.set_num_threads(1)
    config = run.config.model_copy(update={"steps": drill.steps})
    one, two = folder / "one", folder / "two"
    train(config, one, LocalCheckpoints(one, keep=1).save)
    train_on(2, config, two)
    expected, undisturbed = rows_of(one), _newest(one)
    drill.rounding_loss = worst_loss(rows_of(two), expected)
    drill.rounding_weights = _distance(_newest(two), undisturbed)
    compare(drill, run.rows(), expected, folder.parent / "final", undisturbed)


def compare(
    drill: Drill,
    rows: Sequence[Row],
    expected: Sequence[Row],
    final: Path,
    undisturbed: Path,
) -> None:
    """Fill in the numbers of ``drill`` and its problems, from the rows of the metrics and the last
    checkpoints of both runs."""
    taken = Counter(row["step"] for row in rows)
    drill.missing_steps = len(set(range(1, drill.steps + 1)) - taken.keys())
    drill.repeated_steps = sum(times - 1 for times in taken.values())
    drill.worst_loss = worst_loss(rows, expected)
    drill.samples = json.loads((final / "state.json").read_text())["samples_consumed"]
    drill.weights = _distance(final, undisturbed)
    loss = min(LOSS_TOLERANCE + ROUNDING_FACTOR * drill.rounding_loss, LARGEST_DIFFERENCE)
    weights = min(WEIGHT_TOLERANCE + ROUNDING_FACTOR * drill.rounding_weights, LARGEST_DIFFERENCE)
    checks = {
        "steps are missing": not drill.missing_steps,
        "steps are there twice": not drill.repeated_steps,
        "the samples are not those of the steps": drill.samples == drill.steps * BATCH,
        "losses differ": drill.worst_loss <= loss,
        "weights differ": drill.weights <= weights,
    }
    drill.problems += [problem for problem, passed in checks.items() if not passed]


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """Rows of the steps in the metrics of a run; none where it has not begun."""
    path = folder / METRICS
    return [row for row in read_metrics(path) if "event" not in row] if path.exists() else []


def worst_loss(rows: Sequence[Row], expected: Sequence[Row]) -> float:
    """Greatest relative difference of a loss from that of the same step."""
    by_step = {row["step"]: row for row in rows}
    return max(
        abs(by_step.get(row["step"], {}).get(name, 0.0) / row[name] - 1)
        for row in expected
        for name in ("denoising", "feature", "attention")
        if row.get(name)
    )


def _newest(folder: Path) -> Path:
    checkpoint = latest_checkpoint(folder)
    assert checkpoint is not None
    return checkpoint


def _distance(found: Path, wanted: Path) -> float:
    """The greatest distance of a file of weights in two checkpoints."""
    files = [file.name for file in wanted.glob("*.safetensors")]
    return max(_distance_of_files(found / name, wanted / name) for name in files)


def _distance_of_files(one: Path, other: Path) -> float:
    """L2 norm of the difference of all weights, in relation to the other's. Single tensors may be
    farther apart: the gradient of an attention key's bias is 0 but for rounding, and AdamW takes
    steps of full length along it."""
    found, wanted = load_file(one), load_file(other)
    assert found.keys() == wanted.keys()
    a, b = (torch.cat([w[name].double().flatten() for name in wanted]) for w in (found, wanted))
    return float((a - b).norm() / b.norm())


def _line(drill: Drill, run: DrilledRun) -> str:
    return (
        f"{drill.losses} losses ({drill.noticed} with notice), {drill.joins} joins, "
        f"{len(run.cluster.nodes)} nodes, step {run.step()}, checkpoint {run.saved()}"
    )
