"""The loop of a training run, from its first or resumed step to its last."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.alignment.aligned_student import CLASS_TOKEN_LOSS
from pipeline.alignment.termination import Decision, StepLosses, alignment_factor
from pipeline.checkpoints.background import BackgroundCheckpoints
from pipeline.checkpoints.division import part_of
from pipeline.checkpoints.state import (
    TEXT_ENCODER,
    CheckpointContents,
    classes_to_save,
    read_state,
)
from pipeline.distributed.process_group import ProcessGroup
from pipeline.distributed.signals import PollRequest, StopRequest, no_request
from pipeline.runs.compatibility import resolve_run
from pipeline.runs.directory import write_summary
from pipeline.runs.metrics import NOT_FINITE, VALIDATION_LOSS
from pipeline.storage.redaction import redacted_config
from pipeline.store import Store
from pipeline.train.assembly import RunParts, build_run
from pipeline.train.finite import FiniteWatch
from schemas.errors import NonFiniteError, StoppedError
from schemas.run import RunConfig

if TYPE_CHECKING:
    from pipeline.train.validation.loss import ValidationLoss

SaveCheckpoint = Callable[[int, CheckpointContents], None]
"""(step, contents) -> None. Called on every rank at the same steps; the main rank writes, and so do
others whose contents have a ``share``, in a thread unless ``checkpoint.background`` is false."""


def train(
    config: RunConfig,
    folder: Path,
    save_checkpoint: SaveCheckpoint,
    *,
    group: ProcessGroup | None = None,
    resume: Path | None = None,
    poll: PollRequest = no_request,
) -> dict[str, Any]:
    """Check ``config`` against its store and the verified checkpoint ``resume``, then train.

    Without a driver in another process, every rank calls this; see ``run_training``. Raises
    ``UserError``.
    """
    assert config.store is not None
    saved = None if resume is None else read_state(resume)
    config = resolve_run(config, Store.open(config.store).manifest, saved, resume)
    checkpoint = nullcontext(resume)  # a Path is a context manager itself, which does nothing
    resumes = resume is not None
    return run_training(
        config, folder, save_checkpoint, checkpoint, group=group, poll=poll, resumes=resumes
    )


def run_training(
    config: RunConfig,
    folder: Path,
    save_checkpoint: SaveCheckpoint,
    checkpoint: AbstractContextManager[Path | None],
    *,
    group: ProcessGroup | None = None,
    poll: PollRequest = no_request,
    before_save: Callable[[], None] = lambda: None,
    resumes: bool = False,
) -> dict[str, Any]:
    """Train a config that ``resolve_run`` has checked; metrics and summary go to ``folder``. Every
    rank calls this. Returns the summary.

    ``checkpoint`` gives the verified checkpoint to continue from, or None, while it is entered.
    ``poll`` is called at every step and says whether to save or to stop. If any rank is told to
    stop, all save and raise ``StoppedError``. ``before_save`` is called at the step of a
    checkpoint, when the one before is written. ``resumes``: ``checkpoint`` will give one, so that
    no weights are initialised.
    """
    parts = build_run(config, folder, group or ProcessGroup(), checkpoint, poll, resumes=resumes)
    try:
        return TrainingLoop(parts, save_checkpoint, before_save).run_to_end()
    finally:
        parts.close()


class TrainingLoop:
    """The steps of one run, and its events between steps: checkpoints, validation, termination."""

    def __init__(
        self,
        parts: RunParts,
        save_checkpoint: SaveCheckpoint,
        before_save: Callable[[], None] = lambda: None,
    ) -> None:
        self.parts = parts
        self.config = parts.config
        self.trainer = parts.trainer
        self.group = parts.group
        self.meter = parts.meter
        self.finite = FiniteWatch(
            parts.group, self.config.train.max_skipped, parts.trainer.module.losses
        )
        self.checkpoints = BackgroundCheckpoints(
            save_checkpoint, parts.group.device, enabled=parts.config.checkpoint.background
        )
        self.before_save = before_save
        self.saved_step = parts.trainer.step
        self.validated_step = parts.progress.validated_step
        self.bytes_at_termination: dict[str, int] | None = None
        if parts.trainer.termination is not None:
            self.bytes_at_termination = dict.fromkeys(parts.loader.bytes_read, 0)
        self.bytes_logged: dict[str, int] = {}
        self._paused = False

    def run_to_end(self) -> dict[str, Any]:
        """Train up to ``config.steps``. Returns the summary; raises ``StoppedError`` and
        ``NonFiniteError``. No checkpoint is being written afterwards."""
        with self.checkpoints:
            self._take_steps()
            self.checkpoints.wait()
            return self._summarise()

    def _take_steps(self) -> None:
        config, trainer, parts = self.config, self.trainer, self.parts
        batches = iter(parts.loader)
        self.meter.restart_clock()
        if trainer.step and self.validated_step != trainer.step:
            self._validate_if_due(resumed=True)
        while trainer.step < config.steps:
            self._save_or_stop_if_requested()
            self._terminate_if_due()
            parts.trace.before(trainer.step + 1)
            before = time.perf_counter()
            batch = next(batches)
            waited = time.perf_counter() - before
            if batch.step != trainer.step:
                raise RuntimeError(f"batch of step {batch.step} at step {trainer.step}")
            trainer.factor = alignment_factor(config.alignment, parts.trigger, trainer.step)
            result = trainer.train_step(batch)
            self.finite.note(trainer.step, result, trainer.skipped)
            self.meter.add(result, waited, trainer.skipped)
            if trainer.aligned:
                losses = result[1:4] / config.global_batch
                parts.trigger.record(StepLosses(*losses), trainer.skipped)
            parts.clock.tick(1 if trainer.aligned else 2)
            if trainer.step % config.log_every == 0 or trainer.step == config.steps:
                self._log_row()
            elif parts.metrics is not None:
                parts.metrics.note_step(trainer.step)
            if trainer.step % config.checkpoint.every == 0 or trainer.step == config.steps:
                self._save()
            self._validate_if_due(resumed=False)
        parts.trace.close()

    def _save_or_stop_if_requested(self) -> None:
        self.checkpoints.check()
        request = self.parts.consensus.at_boundary()
        if request is not StopRequest.GO_ON and self.trainer.step > self.saved_step:
            self._save()
        if request is StopRequest.STOP:
            self.checkpoints.wait()
            raise StoppedError(
                f"run '{self.config.name}' was stopped after step {self.trainer.step} of "
                f"{self.config.steps}; run the same command again to continue"
            )

    def _terminate_if_due(self) -> None:
        """Evaluate the trigger before a step, and end the alignment if it decides so."""
        trainer, trigger = self.trainer, self.parts.trigger
        if not trainer.aligned or not trigger.wants(trainer.step):
            return
        if trainer.step % self.config.log_every and self.meter.steps:
            self._log_row()  # so that no row spans two phases or includes the measurement's time
        self._require_finite()
        decision = trigger.observe(trainer.step, self.parts.probe, self.group.sum)
        if decision.not_finite:
            decision = self._no_decision(decision)
        config = self.config.alignment.termination
        terminates = decision.terminate and config is not None and not config.dry
        event = "trigger observation"
        if decision.terminate:
            event = "alignment terminated" if terminates else "alignment would terminate (dry)"
        self._log_event({"event": event, **decision.observation})
        if terminates:
            self._terminate(decision.observation)
        self.meter.restart()
        self.parts.clock.pause()

    def _no_decision(self, decision: Decision) -> Decision:
        """An observation of numbers that are not finite ends the run, or where bad steps are
        skipped decides nothing."""
        broken = decision.not_finite
        reason = f"the trigger's {', '.join(broken)} after step {self.trainer.step} is not finite"
        if self.config.train.on_nan == "stop":
            raise self._stopped(reason)
        return Decision(
            False, {**decision.observation, **dict.fromkeys(broken), "reason": f"{reason}: ignored"}
        )

    def _require_finite(self, *, weights: bool = False) -> None:
        """Raises ``NonFiniteError`` on all ranks if any step so far, or with ``weights`` anything
        that a checkpoint would hold, is not finite. Waits for the device."""
        try:
            self.finite.check(self.trainer.tensors() if weights else {})
        except NonFiniteError as error:
            raise self._stopped(str(error)) from None

    def _stopped(self, reason: str) -> NonFiniteError:
        """The error of a run that cannot go on, with a row in the metrics."""
        self.checkpoints.wait()  # so that the message is true
        saved = self.saved_step
        advice = "give a lower --optimizer.learning-rate under another --name"
        if self.config.train.on_nan == "stop":
            advice += ", or --train.on-nan skip_step if single batches are the cause"
        newest = f"its newest checkpoint is of step {saved}" if saved else "it has no checkpoint"
        self._log_event({"event": NOT_FINITE, "reason": reason})
        return NonFiniteError(f"run '{self.config.name}' stopped: {reason}; {newest}; {advice}")

    def _terminate(self, evidence: Mapping[str, Any]) -> None:
        """End the alignment on this rank: after this, no byte of a teacher stream is read. Memory
        of the projectors is freed, which a checkpoint may still be copied from."""
        self.checkpoints.wait()
        self.parts.loader.close_streams(self.parts.teacher_streams)
        self.trainer.terminate(evidence)
        self.bytes_at_termination = self._bytes_now()

    def _log_row(self) -> None:
        self._require_finite()
        row: dict[str, Any] = {"step": self.trainer.step, "phase": 1 if self.trainer.aligned else 2}
        row.update(self.meter.take(self._measured_losses()))
        if self.trainer.aligned and self._has_ramp:
            row["alignment_factor"] = self.trainer.factor  # of the row's last step
        before = time.perf_counter()
        row.update(self.parts.throughput.rates(row["images_per_second"]))
        self.meter.leave_out(time.perf_counter() - before)  # the first call counts FLOPs
        for name, count in self.group.sum_counts(self._bytes_now()).items():
            row[f"bytes_read_{name}"] = count
            new = count - self.bytes_logged.get(name, 0)
            row[f"bytes_per_second_{name}"] = round(new / self.meter.seconds)
            self.bytes_logged[name] = count
        if self.parts.metrics is not None:
            self.parts.metrics.row(row)

    def _log_event(self, values: Mapping[str, Any]) -> None:
        if self.parts.metrics is not None:
            self.parts.metrics.row({"step": self.trainer.step, **values})

    def _validate_if_due(self, *, resumed: bool) -> None:
        """Validate after the checkpoint of the same step, because it may take minutes in which this
        worker may be killed. Requests to save or stop are served between batches of samples. A run
        that has just ``resumed`` validates the step of its checkpoint if that was interrupted."""
        step, loss, validator = self.trainer.step, self.parts.validation_loss, self.parts.validator
        if not any(part is not None and part.due(step) for part in (loss, validator)):
            return
        self._require_finite(weights=True)
        with self._outside_training():
            self.checkpoints.wait()
            pause = self._save_or_stop_if_requested
            events = [self._measure(loss)] if loss is not None and loss.due(step) else []
            if validator is not None and validator.due(step):
                student = self.trainer.averaged_student()
                events += validator.run(student, step, pause, resumed=resumed)
            # after the last pause, because a checkpoint in between must not hold half of it
            for event in events:
                if event["event"] == VALIDATION_LOSS and event["validation_model"] is not None:
                    self.parts.trigger.record_validation(step, event["validation_model"])
                self._log_event(event)
            self.validated_step = step

    def _measure(self, loss: ValidationLoss) -> dict[str, Any]:
        """The event of the validation loss; bytes that it reads do not count in rates, as its time
        does not."""
        before = dict(loss.bytes_read)
        event = loss.measure(self._save_or_stop_if_requested)
        new = {name: count - before.get(name, 0) for name, count in loss.bytes_read.items()}
        if new:
            for name, count in self.group.sum_counts(new).items():
                self.bytes_logged[name] = self.bytes_logged.get(name, 0) + count
        return event

    @contextmanager
    def _outside_training(self) -> Iterator[None]:
        """Exclude the time inside from all rates. May be nested."""
        outermost, self._paused = not self._paused, True
        start = time.perf_counter()
        try:
            yield
        finally:
            if outermost:
                self._paused = False
                self.meter.leave_out(time.perf_counter() - start)
                self.parts.clock.pause()

    @property
    def _has_ramp(self) -> bool:
        alignment = self.config.alignment
        end = alignment.termination
        return alignment.warmup is not None or (end is not None and end.ramp is not None)

    def _measured_losses(self) -> list[str]:
        """Names of the losses that are computed in the present phase."""
        names = ["denoising"]
        names += [CLASS_TOKEN_LOSS] if self.config.student.class_token is not None else []
        if not self.trainer.aligned:
            return names
        alignment = self.config.alignment
        names += ["feature"] if alignment.feature_weights else []
        names += ["attention"] if alignment.attention_weights else []
        names += ["teacher_entropy"] if self.parts.trigger.needs_entropy else []
        for label, stream in zip(alignment.labels, alignment.streams, strict=True):
            names += [f"feature_{label}"] if stream.feature_weight else []
            names += [f"attention_{label}"] if stream.attention_weight else []
        return names

    def _bytes_now(self) -> dict[str, int]:
        """Bytes of samples that this process has read, per open stream."""
        counts = self.parts.loader.bytes_read
        loss = self.parts.validation_loss
        for other in (self.parts.probe.bytes_read, {} if loss is None else loss.bytes_read):
            for name, count in other.items():
                counts[name] += count
        return counts

    def _save(self) -> None:
        self._require_finite(weights=True)
        with self._outside_training():
            self.checkpoints.wait()
            self.before_save()
            contents = part_of(self._checkpoint(), self.group)
            writes = self.group.is_main or contents.share is not None
            self.trainer.copied = self.checkpoints.save(self.trainer.step, contents, behind=writes)
            self.saved_step = self.trainer.step
            self.parts.consensus.forget()

    def _checkpoint(self) -> CheckpointContents:
        """Everything that a resumed run needs; every rank calls it."""
        trainer, parts = self.trainer, self.parts
        progress = trainer.state_dict()
        return CheckpointContents(
            weights={name: module.state_dict() for name, module in trainer.modules().items()},
            optimizer=progress["optimizer"],
            state={
                "step": progress["step"],
                "samples_consumed": trainer.step * self.config.global_batch,
                "phase": 1 if trainer.aligned else 2,
                "termination": progress["termination"],
                "trigger": parts.trigger.state_dict(self.group.gather),
                "bytes_read": self._bytes_read(),
                "meter": self.meter.state_dict(),
                "metrics_rows": parts.metrics.rows if parts.metrics is not None else 0,
                "looked": self.validated_step == trainer.step,
                "store": parts.identity,
                **classes_to_save(parts.store.manifest.dataset.classes, self.config),
                **self._text_encoder(),
                "data": parts.loader.state(),
                "autoencoder": parts.store.manifest.autoencoder.model_dump(),
                "config": redacted_config(self.config.model_dump(mode="json")),
            },
        )

    def _text_encoder(self) -> dict[str, Any]:
        """The entry of ``state.json`` for a student that reads captions, so that it can be given
        others without its store."""
        captions = self.trainer.inputs.captions
        return {} if captions is None else {TEXT_ENCODER: captions.encoder_info.model_dump()}

    def _bytes_read(self) -> dict[str, dict[str, int]]:
        """Bytes read per stream of the store, before and after the termination, summed over all
        workers and over the part of the run before it was resumed."""
        now = dict.fromkeys(self.parts.store.manifest.streams, 0) | self._bytes_now()
        at_end = self.bytes_at_termination
        before = now if at_end is None else dict.fromkeys(now, 0) | at_end
        after = {name: now[name] - before[name] for name in now}
        total_before = self.group.sum_counts(before)
        total_after = self.group.sum_counts(after)
        earlier = self.parts.progress.bytes_read
        nothing: Mapping[str, int] = {"before": 0, "after": 0}
        return {
            name: {
                "before": total_before[name] + earlier.get(name, nothing)["before"],
                "after": total_after[name] + earlier.get(name, nothing)["after"],
            }
            for name in now
        }

    def _summarise(self) -> dict[str, Any]:
        termination, clock = self.trainer.termination, self.parts.clock
        summary = {
            "name": self.config.name,
            "steps": self.trainer.step,
            "termination_step": termination and termination["terminated_at_step"],
            "steps_per_second": {"phase1": clock.rate(1), "phase2": clock.rate(2)},
            "bytes_read": self._bytes_read(),
        }
        if self.group.is_main:
            write_summary(self.parts.folder, summary)
        return summary
