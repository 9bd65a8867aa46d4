"""The batch files of Slurm on a real one: two nodes on this machine."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from pipeline.checkpoints.selection import latest_state
from pipeline.cli.options import parse_options
from pipeline.runs.directory import RunFolder
from pipeline.runs.metrics import read_metrics
from schemas.run import RunConfig
from tests.pipeline.train.test_loop import losses, weights
from tests.processes import train_on

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docker" / "slurm"
DAEMONS = ("munged", "slurmctld", "slurmd")
SYSTEM = ":/usr/sbin:/usr/bin:/sbin:/bin"
CONF = """\
ClusterName=haste
SlurmctldHost={host}(127.0.0.1)
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
SlurmctldPort={ports[0]}
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
MpiDefault=none
JobRequeue=1
KillWait=5
GresTypes=gpu
SlurmdParameters=config_overrides
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 Gres=gpu:16 {memory}
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 Gres=gpu:16 {memory}
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
"""``cred_expire``: seconds until a requeued job starts again, which are 120 by default."""


class Slurm:
    """A controller and two nodes with 2 CPUs and 16 devices each, which only Slurm takes for GPUs,
    so that the files' own sizes fit."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        path = f"{os.environ['PATH']}{SYSTEM}"
        kept = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
        self.variables = kept | {"SLURM_CONF": f"{folder}/slurm.conf", "PATH": path}
        self.variables |= {"HASTE_VENV": str(Path(sys.executable).parents[1])}
        with ExitStack() as stack:
            probes = [stack.enter_context(socket.socket()) for _ in range(3)]
            for probe in probes:
                probe.bind(("127.0.0.1", 0))
            ports = [probe.getsockname()[1] for probe in probes]
        for name in ("state", "n1", "n2"):
            (folder / name).mkdir()
        devices = [folder / f"device{number}" for number in range(16)]
        for device in devices:
            device.touch()
        host = socket.gethostname().partition(".")[0]
        text = CONF.format(folder=folder, host=host, ports=ports, memory="RealMemory=1000")
        (folder / "slurm.conf").write_text(text)
        (folder / "gres.conf").write_text(f"NodeName=n[1-2] Name=gpu File={folder}/device[0-15]\n")
        (folder / "munge.key").write_bytes(os.urandom(1024))
        (folder / "munge.key").chmod(0o600)

    def start(self) -> None:
        files = {"socket": "socket", "key-file": "key", "pid-file": "pid", "log-file": "log"}
        files["seed-file"] = "seed"
        options = [f"--{name}={self.folder}/munge.{end}" for name, end in files.items()]
        self.call("munged", "--force", *options)
        self.call("slurmctld")
        for node in ("n1", "n2"):
            self.call("slurmd", "-N", node)
        self.until(lambda: self.call("sinfo", "-h", "-o", "%A").strip() == "0/2", 60)

    def stop(self) -> None:
        """End the jobs, whose Ray would stay, and the daemons, which write files at their end."""
        ended = time.monotonic() + 20
        subprocess.run(["scancel", "--user=root"], env=self.variables, check=False)
        while time.monotonic() < ended and self.call("squeue", "--noheader").strip():
            time.sleep(0.5)
        files = [self.folder / f"{name}.pid" for name in ("n1", "n2", "slurmctld", "munge")]
        pids = [int(file.read_text()) for file in files if file.is_file()]
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        deadline = time.monotonic() + 20
        while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < deadline:
            time.sleep(0.1)

    def call(self, *command: str) -> str:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=self.variables,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def submit(self, file: str, *words: str, options: tuple[str, ...] = ()) -> tuple[str, Path]:
        """Number of a new job and its log. A node of the test has one CPU for it."""
        log = self.folder / f"{file}-{time.monotonic_ns()}.log"
        own = ("--parsable", "--cpus-per-task=1", f"--output={log}", *options)
        return self.call("sbatch", *own, f"docker/slurm/{file}", *words).strip(), log

    def until(self, ready: Callable[[], bool], seconds: float, log: Path | None = None) -> None:
        deadline = time.monotonic() + seconds
        while not ready():
            text = log.read_text()[-6000:] if log and log.is_file() else ""
            assert time.monotonic() < deadline, f"not within {seconds:.0f} s\n{text}"
            time.sleep(0.3)

    def end_of(self, job: str, log: Path) -> str:
        """State and exit code of a job that has ended."""
        done = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        self.until(lambda: self.field(job, "JobState") in done, 300, log)
        return f"{self.field(job, 'JobState')} {self.field(job, 'ExitCode')}"

    def field(self, job: str, name: str) -> str:
        words = self.call("scontrol", "show", "job", job).split()
        return next(word.partition("=")[2] for word in words if word.startswith(f"{name}="))


@pytest.fixture(scope="module")
def slurm() -> Iterator[Slurm]:
    missing = [name for name in DAEMONS if shutil.which(name, path=SYSTEM[1:]) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)}: not installed (apt-get install slurm-wlm)")
    if os.geteuid() != 0:
        pytest.skip("Slurm of two nodes on one machine is started by root")
    folder = Path(tempfile.mkdtemp(prefix="hs-", dir="/tmp"))  # short socket paths
    server = Slurm(folder)
    try:
        server.start()
        yield server
    finally:
        server.stop()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def store(slurm: Slurm) -> str:
    """A store that a job on two nodes has made."""
    url = str(slurm.folder / "store")
    job, log = slurm.submit("extract.sbatch", "--dataset", "demo", "--store", url)
    assert slurm.end_of(job, log) == "COMPLETED 0:0", log.read_text()
    text = log.read_text()
    assert "Ray runs on 2 nodes" in text
    assert "is complete: 1797 samples" in text
    return url


@pytest.mark.parametrize("file", sorted(FOLDER.iterdir()), ids=lambda file: file.name)
def test_bash_parses(file: Path) -> None:
    if shutil.which("bash") is None:
        pytest.skip("bash is not installed")
    done = subprocess.run(["bash", "-n", str(file)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


FAKES = {
    "ray": """\
#!/bin/sh
echo "$SLURMD_NODENAME has ${SLURM_GPUS_ON_NODE:-no} GPUs"
exec sleep 600
""",
    "python": """\
#!/bin/bash
case $1 in
-c) [ ! -e "${0%/*}/broken-$SLURMD_NODENAME" ] ;;
-) cat >/dev/null ;;
*) trap 'echo saved; exit 143' TERM; echo "trains $*"; while :; do sleep 0.1; done ;;
esac
""",
}
"""Programs in place of Ray and the command: what follows is Slurm's part and the batch files'."""


@pytest.fixture
def fakes(slurm: Slurm, tmp_path: Path) -> Path:
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in FAKES.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return folder


@pytest.mark.slow
def test_the_last_task_of_an_array_goes_back_alone(slurm: Slurm, fakes: Path) -> None:
    """Its number is the array's, by which Slurm's commands would take all of its tasks."""
    export = f"--export=HASTE_VENV={fakes.parent}"  # and no other variable
    job, log = slurm.submit("train.sbatch", "a b", options=("--array=0-1", export))
    tasks = [f"{job}_{number}" for number in (0, 1)]
    slurm.until(lambda: log.is_file() and log.read_text().count("trains") == 2, 60, log)
    slurm.call("scancel", "--signal=USR1", "--batch", tasks[1])
    slurm.until(lambda: slurm.field(tasks[1], "Restarts") == "1", 60, log)
    text = log.read_text()
    assert text.count("saved") == 1
    assert f"job {tasks[1]} goes back to the queue" in text
    assert slurm.field(tasks[0], "JobState") == "RUNNING"
    assert slurm.field(tasks[0], "Restarts") == "0"
    slurm.call("scancel", job)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("option", "gpus"), [("--gpus-per-node=0", "no"), ("--gres=gpu:2", "2"), ("--comment=x", "8")]
)
def test_gpus_of_the_job_are_those_of_its_nodes(
    slurm: Slurm, fakes: Path, option: str, gpus: str
) -> None:
    """Also where the command line has other GPUs than the file; missing ones are said."""
    export = f"--export=ALL,HASTE_VENV={fakes.parent}"
    job, log = slurm.submit("train.sbatch", options=(option, export))
    slurm.until(lambda: log.is_file() and log.read_text().count("GPUs") >= 2, 60, log)
    slurm.until(lambda: "trains" in log.read_text(), 60, log)
    slurm.call("scancel", "--signal=TERM", "--batch", job)
    assert slurm.end_of(job, log) == "FAILED 143:0"
    text = log.read_text()
    assert all(f"{node} has {gpus} GPUs" in text for node in ("n1", "n2"))
    if shutil.which("nvidia-smi") is None:
        missing = f"n2: Slurm gave {gpus} GPUs, and nvidia-smi lists 0" in text
        assert missing == (gpus != "no")


@pytest.mark.slow
def test_a_node_without_the_environment_is_named(slurm: Slurm, fakes: Path) -> None:
    (fakes / "broken-n2").touch()
    export = f"--export=ALL,HASTE_VENV={fakes.parent}"
    job, log = slurm.submit("train.sbatch", options=(export,))
    assert slurm.end_of(job, log) == "FAILED 1:0"
    assert f"n2: no Ray or no checkout: HASTE_VENV ({fakes.parent})" in log.read_text()
    assert "trains" not in log.read_text()


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_run_survives_all_that_slurm_does_to_it(slurm: Slurm, store: str, tmp_path: Path) -> None:
    """A requeue (from the latest checkpoint on), the two signals and the time limit (each with a
    checkpoint): the losses and weights are those of an undisturbed run on two processes."""
    output = str(slurm.folder / "runs")
    words = ["--config", "jobs/configs/demo.yaml", "--store", store, "--output", output]
    words += ["--log-every", "2", "--checkpoint.every", "10", "--global-batch", "8"]
    words += ["--alignment.termination.step", "20"]
    config = parse_options(RunConfig, words, command="", about="")
    run = RunFolder(config)
    folder = Path(output) / "demo"
    job, log = slurm.submit("train.sbatch", *words, "--steps", "100000")

    def saved() -> int:
        state = latest_state(run.checkpoints)
        return 0 if state is None else state.step

    def last() -> int:
        rows = [row for row in read_metrics(folder / "metrics.jsonl") if "event" not in row]
        return rows[-1]["step"] if rows else 0

    def trains_on() -> None:
        """Rows of steps after the checkpoint stay until the run resumes: wait for later ones."""
        before = max(last(), saved())
        slurm.until(lambda: last() > before, 240, log)

    def starts(number: int) -> None:
        slurm.until(lambda: slurm.field(job, "Restarts") == str(number), 120, log)

    slurm.until(lambda: saved() > 0, 240, log)
    slurm.call("scontrol", "requeue", job)
    starts(1)
    trains_on()

    before = saved()
    slurm.call("scancel", "--signal=USR1", "--batch", job)
    starts(2)
    first = saved()
    assert first > before
    assert log.read_text().count("goes back to the queue") == 1
    trains_on()

    slurm.call("scontrol", "update", f"JobId={job}", "TimeLimit=4")  # less than --signal asks for
    slurm.until(lambda: log.read_text().count("goes back to the queue") == 2, 120, log)
    slurm.call("scontrol", "update", f"JobId={job}", "TimeLimit=60")
    starts(3)
    second = saved()
    assert second > first
    trains_on()

    slurm.call("scancel", "--signal=TERM", "--batch", job)
    assert slurm.end_of(job, log) == "FAILED 143:0"
    assert "run the same command again to continue" in log.read_text()
    third = saved()
    assert third > second
    steps = ["--steps", str(third + 5)]
    job, log = slurm.submit("train.sbatch", *words, *steps)
    assert slurm.end_of(job, log) == "COMPLETED 0:0", log.read_text()
    assert not list(Path("/tmp").glob(f"haste-{job}-*"))

    whole = parse_options(RunConfig, [*words, *steps], command="", about="")
    train_on(2, whole, tmp_path / "whole")
    assert losses(folder) == losses(tmp_path / "whole")
    one, other = weights(folder), weights(tmp_path / "whole")
    assert all(one[name].equal(other[name]) for name in one)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_jobs_share_a_node(slurm: Slurm, store: str) -> None:
    """Ports and folders of two jobs on the same two nodes do not meet."""
    output = slurm.folder / "runs"
    words = ["--config", "jobs/configs/demo.yaml", "--store", store, "--steps", "100000"]
    words += ["--output", str(output), "--log-every", "1"]
    jobs = [slurm.submit("train.sbatch", *words, "--name", name) for name in ("one", "two")]
    for name, (_, log) in zip(("one", "two"), jobs, strict=True):
        metrics = output / name / "metrics.jsonl"
        slurm.until(lambda file=metrics: bool(read_metrics(file)), 240, log)  # type: ignore[misc]
    assert {slurm.field(job, "JobState") for job, _ in jobs} == {"RUNNING"}
    assert {slurm.field(job, "NodeList") for job, _ in jobs} == {"n[1-2]"}
    for job, _ in jobs:
        slurm.call("scancel", "--signal=TERM", "--batch", job)
    for job, log in jobs:
        assert slurm.end_of(job, log) == "FAILED 143:0", log.read_text()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_symmetric_run_on_one_node(slurm: Slurm, store: str) -> None:
    """Two nodes on one machine have one address, and each would take itself for the head."""
    train = ["python", "jobs/train_haste.py", "--config", "jobs/configs/demo.yaml"]
    train += ["--store", store, "--steps", "4", "--output", str(slurm.folder / "runs")]
    train += ["--name", "symmetric", "--workers.count", "1"]
    job, log = slurm.submit("symmetric.sbatch", *train, options=("--nodes=1",))
    ended = slurm.end_of(job, log)
    if "Ray is already started on this node" in log.read_text():
        pytest.skip("another Ray runs on this machine, which symmetric-run refuses")
    assert ended == "COMPLETED 0:0", log.read_text()
    assert (slurm.folder / "runs" / "symmetric" / "summary.json").is_file()
