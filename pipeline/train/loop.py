"""A training run from its first or resumed step to its last."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import yaml

from pipeline.alignment.termination import StepLosses, Trigger, make_trigger
from pipeline.checkpoints.selection import Write
from pipeline.checkpoints.store_identity import store_identity, with_stream
from pipeline.distributed.process_group import ProcessGroup
from pipeline.distributed.signals import PollRequest, StopRequest, no_request
from pipeline.runs.compatibility import check_store
from pipeline.runs.metrics import CONFIG, SUMMARY, MetricsLog
from pipeline.storage.files import write_atomic
from pipeline.storage.redaction import redacted_config
from pipeline.store import BatchLoader, SampleOrder, Store
from pipeline.store.reading.batch_loader import loader_options
from pipeline.train.checkpoint import load_checkpoint, write_checkpoint
from pipeline.train.gradient_probe import GradientProbe
from pipeline.train.profiler import StepTrace
from pipeline.train.step_meter import PhaseClock, StepMeter, Throughput
from pipeline.train.stop_consensus import StopConsensus
from pipeline.train.trainer import Trainer
from schemas.errors import StoppedError
from schemas.run import RunConfig

SaveCheckpoint = Callable[[int, Write], None]
"""(step, write) -> None. Called on every rank at the same steps; the first rank calls ``write``
with an empty folder and keeps what it finds there afterwards."""


def train(
    config: RunConfig,
    folder: Path,
    save_checkpoint: SaveCheckpoint,
    *,
    parallel: ProcessGroup | None = None,
    resume: Path | AbstractContextManager[Path | None] | None = None,
    ask: PollRequest = no_request,
) -> dict[str, Any]:
    """Train as ``config`` says; metrics and summary go to ``folder``. Every rank calls this.

    ``resume`` is the folder of a checkpoint of this run, or gives it for as long as it is read.
    ``ask`` is asked at every step whether to save or to stop; where any rank is told to stop, all
    save and raise ``StoppedError``. Returns the summary.
    """
    parallel = parallel or ProcessGroup()
    assert config.store is not None
    store = Store.open(config.store)
    config = with_stream(config, store.manifest, None)
    check_store(config, store.manifest)
    if resume is None or isinstance(resume, Path):  # a Path is a context manager by accident
        resume = nullcontext(resume)
    run = _Run(config, store, folder, parallel, save_checkpoint, resume, ask)
    try:
        return run.to_the_end()
    finally:
        run.close()


class _Run:
    def __init__(
        self,
        config: RunConfig,
        store: Store,
        folder: Path,
        parallel: ProcessGroup,
        save_checkpoint: SaveCheckpoint,
        resume: AbstractContextManager[Path | None],
        ask: PollRequest,
    ) -> None:
        self.config = config
        self.store = store
        self.folder = folder
        self.parallel = parallel
        self.save_checkpoint = save_checkpoint
        self.trigger: Trigger = make_trigger(config.alignment.termination, config.alignment)
        self.trainer = Trainer(config, store, parallel, measure_entropy=self.trigger.needs_entropy)
        self.identity = store_identity(store, config.alignment)
        self.earlier: dict[str, dict[str, int]] = {}  # bytes read before the resume
        self.meter = StepMeter(parallel, config.global_batch)
        rows = 0
        damaged: dict[int, int] = {}
        self.looked_at: int | None = None
        with resume as checkpoint:
            if checkpoint is not None:
                state = load_checkpoint(checkpoint, self.trainer, self.identity)
                self.trigger.load_state_dict(state.trigger, parallel.scatter_saved)
                self.meter.load_state_dict(state.meter)
                self.earlier, rows = state.bytes_read, state.metrics_rows
                if state.looked:
                    self.looked_at = state.step
                left_out = state.data.get("damaged", {})
                damaged = {int(shard): epoch for shard, epoch in left_out.items()}
        self.saved_step = self.trainer.step
        self.agreement = StopConsensus(parallel, ask)
        self.log: MetricsLog | None = None
        if parallel.is_main:
            self.log = MetricsLog(folder, config, start_step=self.trainer.step, rows=rows)
            config_text = yaml.safe_dump(
                redacted_config(config.model_dump(mode="json")), sort_keys=False
            )
            _write(folder / CONFIG, config_text)
        self.order = SampleOrder(
            config.seed, store.index().samples_per_shard, config.data.window, damaged
        )
        self.loader = self._open_loader()
        self.probe = GradientProbe(self.trainer, store, self.order)
        self.bytes_at_termination: dict[str, int] | None = None
        if self.trainer.termination is not None:
            self.bytes_at_termination = dict.fromkeys(self.loader.bytes_read, 0)
        self.bytes_logged: dict[str, int] = {}
        self.effort = Throughput(config.student, parallel)
        self.trace = StepTrace(folder, parallel, config.profile)
        self.clock = PhaseClock()
        self._aside = False
        self.validator = None
        if config.samples.every is not None or config.samples.evaluate.images is not None:
            from pipeline.train.validation.runner import (
                Validator,  # diffusers takes seconds to import
            )

            self.validator = Validator(config, store.manifest, parallel, folder)

    def to_the_end(self) -> dict[str, Any]:
        config, trainer = self.config, self.trainer
        batches = iter(self.loader)
        self.meter.restart_clock()
        if trainer.step and self.looked_at != trainer.step:
            self._look_if_due(again=True)
        while trainer.step < config.steps:
            self._save_or_stop_if_asked()
            self._terminate_if_due()
            self.trace.before(trainer.step + 1)
            asked = time.perf_counter()
            batch = next(batches)
            waited = time.perf_counter() - asked
            if batch.step != trainer.step:
                raise RuntimeError(f"batch of step {batch.step} at step {trainer.step}")
            result = trainer.train_step(batch)
            self.meter.add(result, waited)
            if trainer.aligned:
                self.trigger.record(StepLosses(*(result[1:4] / config.global_batch)))
            self.clock.tick(1 if trainer.aligned else 2)
            if trainer.step % config.log_every == 0 or trainer.step == config.steps:
                self._log_row()
            if trainer.step % config.checkpoint.every == 0 or trainer.step == config.steps:
                self._save()
            self._look_if_due(again=False)
        self.trace.close()
        return self._summarise()

    def close(self) -> None:
        self.loader.close()
        self.trainer.close()
        if self.log is not None:
            self.log.close()

    def _open_loader(self) -> BatchLoader:
        config, manifest = self.config, self.store.manifest
        streams = ["latents"]
        needed_until: dict[str, int] = {}
        if self.trainer.targets is not None:
            teacher = self.trainer.targets.stream
            streams.append(teacher)
            known = self.trigger.known_step()
            if known is not None:
                needed_until[teacher] = known
        self.teacher_streams = [name for name in streams if name in manifest.teacher_streams]
        return BatchLoader(
            self.store,
            streams,
            self.order,
            global_batch=config.global_batch,
            rank=self.parallel.rank,
            world_size=self.parallel.world_size,
            start_step=self.trainer.step,
            needed_until=needed_until,
            agree=self.parallel.union,
            allocate=self.trainer.feed.allocate,
            **loader_options(config.data),
        )

    def _save_or_stop_if_asked(self) -> None:
        wish = self.agreement.at_boundary()
        if wish is not StopRequest.GO_ON and self.trainer.step > self.saved_step:
            self._save()
        if wish is StopRequest.STOP:
            raise StoppedError(
                f"run '{self.config.name}' was stopped after step {self.trainer.step} of "
                f"{self.config.steps}; run the same command again to continue"
            )

    def _terminate_if_due(self) -> None:
        """Ask the trigger at the boundary before a step, and do as it says."""
        trainer = self.trainer
        if not trainer.aligned or not self.trigger.wants(trainer.step):
            return
        if trainer.step % self.config.log_every and self.meter.steps:
            self._log_row()  # so that no row mixes the phases or times a measurement
        decision = self.trigger.observe(trainer.step, self.probe, self.parallel.sum)
        config = self.config.alignment.termination
        terminates = decision.terminate and config is not None and not config.dry
        event = "trigger observation"
        if decision.terminate:
            event = "alignment terminated" if terminates else "alignment would terminate (dry)"
        if self.log is not None:
            self.log.row({"step": trainer.step, "event": event, **decision.observation})
        if terminates:
            self.loader.close_streams(self.teacher_streams)
            trainer.terminate(decision.observation)
            trainer.feed.release()
            self.bytes_at_termination = self._bytes_now()
        self.meter.restart()
        self.clock.pause()

    def _log_row(self) -> None:
        row: dict[str, Any] = {"step": self.trainer.step, "phase": 1 if self.trainer.aligned else 2}
        row.update(self.meter.take(self._measured()))
        row.update(self.effort.rates(row["images_per_second"]))
        for name, count in self.parallel.sum_counts(self._bytes_now()).items():
            row[f"bytes_read_{name}"] = count
            new = count - self.bytes_logged.get(name, 0)
            row[f"bytes_per_second_{name}"] = round(new / self.meter.seconds)
            self.bytes_logged[name] = count
        if self.log is not None:
            self.log.row(row)

    def _look_if_due(self, *, again: bool) -> None:
        """After a checkpoint of the same step, as it may take minutes in which this worker may be
        killed. What is asked of the run meanwhile is done between two batches of samples; a run
        that goes on from a checkpoint looks ``again``."""
        step = self.trainer.step
        if self.validator is None or not self.validator.due(step):
            return
        with self._beside_training():
            pause = self._save_or_stop_if_asked
            for said in self.validator.run(self.trainer.ema.module, step, pause, again=again):
                if self.log is not None:
                    self.log.row({"step": step, **said})
            self.looked_at = step

    @contextmanager
    def _beside_training(self) -> Iterator[None]:
        """No rate counts the time that is spent here; one may be entered within another."""
        outermost, self._aside = not self._aside, True
        began = time.perf_counter()
        try:
            yield
        finally:
            if outermost:
                self._aside = False
                self.meter.leave_out(time.perf_counter() - began)
                self.clock.pause()

    def _measured(self) -> list[str]:
        """The losses that mean something now."""
        if not self.trainer.aligned:
            return ["denoising"]
        alignment = self.config.alignment
        names = ["denoising"]
        names += ["feature"] if alignment.feature_weight else []
        names += ["attention"] if alignment.attention_weight else []
        return names + (["teacher_entropy"] if self.trigger.needs_entropy else [])

    def _bytes_now(self) -> dict[str, int]:
        """Bytes that this process has read, per stream that it opened."""
        counts = self.loader.bytes_read
        for name, count in self.probe.bytes_read.items():
            counts[name] += count
        return counts

    def _save(self) -> None:
        bytes_read = self._bytes_read()
        trigger = self.trigger.state_dict(self.parallel.gather)
        meter = self.meter.state_dict()
        data = self.loader.state()

        def write(folder: Path) -> None:
            write_checkpoint(
                folder,
                self.trainer,
                store=self.identity,
                trigger=trigger,
                bytes_read=bytes_read,
                meter=meter,
                data=data,
                metrics_rows=self.log.rows if self.log is not None else 0,
                looked=self.looked_at == self.trainer.step,
            )

        with self._beside_training():
            self.save_checkpoint(self.trainer.step, write)
            self.saved_step = self.trainer.step
            self.agreement.forget()

    def _bytes_read(self) -> dict[str, dict[str, int]]:
        """Per stream of the store, before and after the termination, summed over all workers and
        over what the run did before it was resumed."""
        now = dict.fromkeys(self.store.manifest.streams, 0) | self._bytes_now()
        at_end = self.bytes_at_termination
        before = now if at_end is None else dict.fromkeys(now, 0) | at_end
        after = {name: now[name] - before[name] for name in now}
        total_before = self.parallel.sum_counts(before)
        total_after = self.parallel.sum_counts(after)
        nothing: Mapping[str, int] = {"before": 0, "after": 0}
        return {
            name: {
                "before": total_before[name] + self.earlier.get(name, nothing)["before"],
                "after": total_after[name] + self.earlier.get(name, nothing)["after"],
            }
            for name in now
        }

    def _summarise(self) -> dict[str, Any]:
        termination = self.trainer.termination
        summary = {
            "name": self.config.name,
            "steps": self.trainer.step,
            "termination_step": termination and termination["terminated_at_step"],
            "steps_per_second": {"phase1": self.clock.rate(1), "phase2": self.clock.rate(2)},
            "bytes_read": self._bytes_read(),
        }
        if self.log is not None:
            _write(self.folder / SUMMARY, json.dumps(summary, indent=1))
        return summary


def _write(path: Path, text: str) -> None:
    from fsspec.implementations.local import LocalFileSystem

    write_atomic(LocalFileSystem(), str(path), text.encode())
