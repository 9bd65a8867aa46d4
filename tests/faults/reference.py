"""The undisturbed store and run, created once for each version of the software."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
import uuid
from pathlib import Path

import torch

from pipeline.store import Store
from schemas.errors import UserError
from tests.faults import workloads
from tests.faults.environments import ROOT, process_variables
from tests.faults.files import open_folder, tree
from tests.faults.processes import kill_all
from tests.faults.timeouts import END_SECONDS, START_SECONDS
from tests.faults.verdict import judge_order


class Reference:
    """Images, a store and a run below ``root``."""

    def __init__(self, root: Path) -> None:
        self.key = source_digest()
        self.folder = root / f"undisturbed-{self.key}"
        self.source = self.folder / "images"
        self.store = self.folder / "store"
        self.run = str(self.folder / "runs" / "demo")

    def make(self) -> None:
        """Create what is missing. Raises ``UserError`` where an undisturbed workload fails."""
        done = self.folder / "done"
        if done.exists():
            return
        shutil.rmtree(self.folder, ignore_errors=True)
        workloads.write_source(self.source)
        self._run(workloads.Extraction(str(self.source), str(self.store)))
        self._run(workloads.Training(str(self.store), str(self.folder / "runs")))
        index = Store.open(str(self.store)).index()
        verdict = judge_order(
            index.samples_per_shard,
            seed=workloads.SEED,
            window=workloads.WINDOW,
            steps=workloads.STEPS,
            batch=workloads.BATCH,
        )
        if verdict.problems:
            raise UserError(verdict.problems[0])
        done.touch()

    def upload(self, url: str) -> None:
        """Copy the store to ``url``."""
        filesystem, root = open_folder(url)
        for path, data in tree(str(self.store)).items():
            filesystem.pipe_file(f"{root}/{path}", data)

    def _run(self, task: workloads.Workload) -> None:
        print(f"undisturbed: {task.name}", file=sys.stderr)
        mark = uuid.uuid4().hex
        ray_folder = Path(tempfile.mkdtemp(prefix="hf-", dir="/tmp"))
        variables = process_variables(mark, self.folder, ray_folder)
        limit = START_SECONDS + END_SECONDS
        try:
            done = subprocess.run(
                task.command(),
                cwd=ROOT,
                env=variables,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=limit,
            )
        except subprocess.TimeoutExpired:
            raise UserError(f"undisturbed, the {task.name} takes more than {limit:.0f} s") from None
        finally:
            kill_all(mark)
            shutil.rmtree(ray_folder, ignore_errors=True)
        if done.returncode:
            raise UserError(f"undisturbed, the {task.name} fails: {done.stdout[-2000:]}")


def source_digest() -> str:
    """Digest of the source files and versions that determine the undisturbed results."""
    digest = hashlib.sha256(torch.__version__.encode())
    files = [*ROOT.glob("pipeline/**/*.py"), *ROOT.glob("schemas/*.py"), *ROOT.glob("jobs/*.py")]
    files += [ROOT / "jobs" / "configs" / "demo.yaml", Path(workloads.__file__)]
    for path in sorted(files):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]
