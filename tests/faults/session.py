"""One run that is disturbed, brought to its end, and judged."""

from __future__ import annotations

import random
import shutil
import sys
import tempfile
import time
import uuid
from contextlib import ExitStack
from pathlib import Path

from tests.faults.driven import Driven
from tests.faults.faults import ENCODER, FAULTS, WORKER, MissedError, Scene
from tests.faults.files import tree
from tests.faults.habitats import HABITATS, Habitat, environment_of
from tests.faults.ledger import Result
from tests.faults.limits import (
    END_SECONDS,
    EXIT_SECONDS,
    POLL_SECONDS,
    PROGRESS_SECONDS,
    SETTLE_SECONDS,
    START_SECONDS,
    AbandonedError,
    BrokenError,
    HungError,
)
from tests.faults.mend import collect_garbage, mend
from tests.faults.plan import Moment, Plan
from tests.faults.processes import entitled, kill_all
from tests.faults.reference import Reference
from tests.faults.verdict import Verdict, judge_run, judge_store
from tests.faults.work import BATCH, STEPS, Extraction, Training, Work


class Session:
    """A plan in a folder of its own, which is gone afterwards."""

    def __init__(self, plan: Plan, seed: int, reference: Reference, root: Path) -> None:
        self.plan = plan
        self.seed = seed
        self.reference = reference
        self.folder = root / f"run-{plan.number:04d}"
        self.mark = uuid.uuid4().hex
        self.rng = random.Random(plan.salt)
        self.results: list[Result] = []

    def run(self, *, most: int, keep: bool = False) -> list[Result]:
        """Make ``most`` of the faults at most. Those that hit nothing are left out."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        with ExitStack() as stack:
            stack.callback(self._clean_up, keep=keep)
            ray_folder = Path(tempfile.mkdtemp(prefix="hf-", dir="/tmp"))  # paths of sockets: short
            stack.callback(shutil.rmtree, ray_folder, ignore_errors=True)
            environment = environment_of(self.mark, self.folder, ray_folder)
            stack.callback(kill_all, self.mark)
            try:
                self._disturb(environment, stack, most)
            except BrokenError as error:
                self._fail(str(error), hung=isinstance(error, HungError))
            except AbandonedError as error:
                print(f"run {self.plan.number} is abandoned: {error}", file=sys.stderr)
                self.results = []
        return self.results

    def _clean_up(self, *, keep: bool) -> None:
        survived = all(result.survived for result in self.results)
        if survived or not keep:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _disturb(self, environment: dict[str, str], stack: ExitStack, most: int) -> None:
        habitat = HABITATS[self.plan.habitat](self.folder, environment)
        stack.enter_context(habitat)
        work = self._work(habitat)
        log = stack.enter_context((self.folder / "output.log").open("wb"))
        driven = stack.enter_context(Driven(work, habitat.environment, log))
        scene = Scene(self.mark, work, habitat, driven.start(), self.rng)
        driven.before_again = lambda: mend(scene, habitat.environment)
        for moment in self.plan.moments[:most]:
            self._strike(moment, scene, driven)
        driven.wait(lambda: False, END_SECONDS, "the end of the work after its last fault")
        if mend(scene, habitat.environment):
            scene.driver = driven.start()
            driven.wait(lambda: False, END_SECONDS, "the end of the work after it was mended")
        self._judge(self._verdict(work, habitat))

    def _strike(self, moment: Moment, scene: Scene, driven: Driven) -> None:
        work = scene.work
        until = f"{moment.at} {work.name} units before {moment.fault}"
        driven.wait(lambda: work.progress() >= moment.at, START_SECONDS, until)
        if driven.done:
            return
        time.sleep(moment.delay)
        scene.driver = driven.process
        before = work.progress()
        began = time.monotonic()
        made = self._result(moment, before)
        try:
            FAULTS[moment.fault].inject(scene)
        except MissedError:
            return
        except BrokenError:
            self.results.append(made)
            raise
        self.results.append(made)
        self._settle(driven)
        before = max(before, work.progress())
        what = f"progress beyond {before} after {moment.fault}"
        driven.wait(lambda: work.progress() > before, PROGRESS_SECONDS, what)
        if scene.damaged:
            return  # the work goes on; what recovers it comes later
        seconds = round(time.monotonic() - began, 1)
        self.results[-1] = made.model_copy(update={"seconds": seconds})

    def _settle(self, driven: Driven) -> None:
        """What was under way may still come to its end, which is no recovery: workers whose driver
        has died go on until Ray tells them."""
        began = time.monotonic()
        while (spent := time.monotonic() - began) < SETTLE_SECONDS or (
            driven.process.poll() is not None
            and spent < EXIT_SECONDS
            and any(entitled(self.mark, title) for title in (ENCODER, WORKER))
        ):
            time.sleep(POLL_SECONDS)

    def _work(self, habitat: Habitat) -> Work:
        source, store = self.reference.source, self.reference.store
        if self.plan.work is Extraction:
            return Extraction(str(source), f"{habitat.url}/store", habitat.address)
        if habitat.url.startswith("s3://"):
            self.reference.upload(f"{habitat.url}/store")
            return Training(f"{habitat.url}/store", f"{habitat.url}/runs", habitat.address)
        return Training(str(store), f"{habitat.url}/runs", habitat.address)

    def _verdict(self, work: Work, habitat: Habitat) -> Verdict:
        if isinstance(work, Training):
            return judge_run(tree(work.folder), tree(self.reference.run), steps=STEPS, batch=BATCH)
        collect_garbage(work.target, habitat.environment)
        return judge_store(tree(work.target), tree(str(self.reference.store)))

    def _result(self, moment: Moment, at: int) -> Result:
        return Result(
            seed=self.seed,
            run=self.plan.number,
            work=self.plan.work.name,
            habitat=self.plan.habitat,
            fault=moment.fault,
            at=at,
            survived=True,
            code=self.reference.key,
        )

    def _judge(self, verdict: Verdict) -> None:
        """A run that went wrong was survived by none of its faults."""
        if verdict.problems and self.results:
            shown = "; ".join(verdict.problems[:5])
            more = len(verdict.problems) - 5
            self._fail(f"{shown}; and {more} more" if more > 0 else shown)
            counts = {"lost": verdict.lost, "duplicated": verdict.duplicated}
            self.results[0] = self.results[0].model_copy(update=counts)

    def _fail(self, told: str, *, hung: bool = False) -> None:
        print(f"run {self.plan.number}: {told}", file=sys.stderr)
        self.results = [r.model_copy(update={"survived": False}) for r in self.results]
        if self.results:
            told = f"{told} [{self._last_words()}]"
            update = {"told": told, "hung": hung}
            self.results[-1] = self.results[-1].model_copy(update=update)

    def _last_words(self) -> str:
        """Of the command: its last line."""
        path = self.folder / "output.log"
        lines = path.read_text(errors="replace").split("\n") if path.exists() else []
        return next((line.strip()[:300] for line in reversed(lines) if line.strip()), "")
