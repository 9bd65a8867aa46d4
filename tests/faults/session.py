"""One disturbed run: fault injection, completion and verdict."""

from __future__ import annotations

import random
import shutil
import sys
import tempfile
import time
import uuid
from contextlib import ExitStack
from pathlib import Path

from tests.faults.environments import ENVIRONMENTS, Environment, process_variables
from tests.faults.faults import ENCODER, FAULTS, WORKER, FaultContext, NoTargetError
from tests.faults.files import tree
from tests.faults.plan import Injection, Plan
from tests.faults.processes import kill_all, pids_with_title
from tests.faults.reference import Reference
from tests.faults.repair import collect_garbage, repair
from tests.faults.results_log import Result
from tests.faults.supervised_command import SupervisedCommand
from tests.faults.timeouts import (
    END_SECONDS,
    EXIT_SECONDS,
    POLL_SECONDS,
    PROGRESS_SECONDS,
    SETTLE_SECONDS,
    START_SECONDS,
    HarnessError,
    RunFailedError,
    WaitTimeoutError,
)
from tests.faults.verdict import Verdict, judge_run, judge_store
from tests.faults.workloads import BATCH, STEPS, Extraction, Training, Workload


class Session:
    """Execution of a plan in a private folder, which is deleted afterwards."""

    def __init__(self, plan: Plan, seed: int, reference: Reference, root: Path) -> None:
        self.plan = plan
        self.seed = seed
        self.reference = reference
        self.folder = root / f"run-{plan.number:04d}"
        self.mark = uuid.uuid4().hex
        self.rng = random.Random(plan.salt)
        self.results: list[Result] = []

    def run(self, *, max_faults: int, keep: bool = False) -> list[Result]:
        """Inject at most ``max_faults`` of the faults. Those without a target are omitted."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        with ExitStack() as stack:
            stack.callback(self._clean_up, keep=keep)
            ray_folder = Path(
                tempfile.mkdtemp(prefix="hf-", dir="/tmp")
            )  # socket paths must be short
            stack.callback(shutil.rmtree, ray_folder, ignore_errors=True)
            variables = process_variables(self.mark, self.folder, ray_folder)
            stack.callback(kill_all, self.mark)
            try:
                self._disturb(variables, stack, max_faults)
            except RunFailedError as error:
                self._fail(str(error), hung=isinstance(error, WaitTimeoutError))
            except HarnessError as error:
                print(f"run {self.plan.number} is abandoned: {error}", file=sys.stderr)
                self.results = []
        return self.results

    def _clean_up(self, *, keep: bool) -> None:
        survived = all(result.survived for result in self.results)
        if survived or not keep:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _disturb(self, variables: dict[str, str], stack: ExitStack, max_faults: int) -> None:
        environment = ENVIRONMENTS[self.plan.environment](self.folder, variables)
        stack.enter_context(environment)
        work = self._work(environment)
        log = stack.enter_context((self.folder / "output.log").open("wb"))
        supervised = stack.enter_context(SupervisedCommand(work, environment.variables, log))
        context = FaultContext(self.mark, work, environment, supervised.start(), self.rng)
        supervised.before_restart = lambda: repair(context, environment.variables)
        for injection in self.plan.injections[:max_faults]:
            self._inject(injection, context, supervised)
        supervised.wait(lambda: False, END_SECONDS, "the end of the work after its last fault")
        if repair(context, environment.variables):
            context.driver = supervised.start()
            supervised.wait(lambda: False, END_SECONDS, "the end of the work after its repair")
        self._judge(self._verdict(work, environment))

    def _inject(
        self, injection: Injection, context: FaultContext, supervised: SupervisedCommand
    ) -> None:
        work = context.work
        until = f"{injection.at} {work.name} units before {injection.fault}"
        supervised.wait(lambda: work.progress() >= injection.at, START_SECONDS, until)
        if supervised.done:
            return
        time.sleep(injection.delay)
        context.driver = supervised.process
        before = work.progress()
        began = time.monotonic()
        result = self._result(injection, before)
        try:
            FAULTS[injection.fault].inject(context)
        except NoTargetError:
            return
        except RunFailedError:
            self.results.append(result)
            raise
        self.results.append(result)
        self._settle(supervised)
        before = max(before, work.progress())
        event = f"progress beyond {before} after {injection.fault}"
        supervised.wait(lambda: work.progress() > before, PROGRESS_SECONDS, event)
        if context.damaged:
            return  # the work continues; the repair comes later
        seconds = round(time.monotonic() - began, 1)
        self.results[-1] = result.model_copy(update={"seconds": seconds})

    def _settle(self, supervised: SupervisedCommand) -> None:
        """Wait until work that was under way has ended, because its progress is not a recovery:
        workers whose driver has died continue until Ray stops them."""
        began = time.monotonic()
        while (spent := time.monotonic() - began) < SETTLE_SECONDS or (
            supervised.process.poll() is not None
            and spent < EXIT_SECONDS
            and any(pids_with_title(self.mark, title) for title in (ENCODER, WORKER))
        ):
            time.sleep(POLL_SECONDS)

    def _work(self, environment: Environment) -> Workload:
        source, store = self.reference.source, self.reference.store
        if self.plan.work is Extraction:
            return Extraction(str(source), f"{environment.url}/store", environment.address)
        if environment.url.startswith("s3://"):
            self.reference.upload(f"{environment.url}/store")
            return Training(
                f"{environment.url}/store", f"{environment.url}/runs", environment.address
            )
        return Training(str(store), f"{environment.url}/runs", environment.address)

    def _verdict(self, work: Workload, environment: Environment) -> Verdict:
        if isinstance(work, Training):
            return judge_run(tree(work.folder), tree(self.reference.run), steps=STEPS, batch=BATCH)
        collect_garbage(work.target, environment.variables)
        return judge_store(tree(work.target), tree(str(self.reference.store)))

    def _result(self, injection: Injection, at: int) -> Result:
        return Result(
            seed=self.seed,
            run=self.plan.number,
            work=self.plan.work.name,
            environment=self.plan.environment,
            fault=injection.fault,
            at=at,
            survived=True,
            code=self.reference.key,
        )

    def _judge(self, verdict: Verdict) -> None:
        """Mark all faults of a run with problems as not survived."""
        if verdict.problems and self.results:
            shown = "; ".join(verdict.problems[:5])
            more = len(verdict.problems) - 5
            self._fail(f"{shown}; and {more} more" if more > 0 else shown)
            counts = {"lost": verdict.lost, "duplicated": verdict.duplicated}
            self.results[0] = self.results[0].model_copy(update=counts)

    def _fail(self, problem: str, *, hung: bool = False) -> None:
        print(f"run {self.plan.number}: {problem}", file=sys.stderr)
        self.results = [r.model_copy(update={"survived": False}) for r in self.results]
        if self.results:
            problem = f"{problem} [{self._last_output_line()}]"
            update = {"problem": problem, "hung": hung}
            self.results[-1] = self.results[-1].model_copy(update=update)

    def _last_output_line(self) -> str:
        """Last line of the command's output that is not empty."""
        path = self.folder / "output.log"
        lines = path.read_text(errors="replace").split("\n") if path.exists() else []
        return next((line.strip()[:300] for line in reversed(lines) if line.strip()), "")
