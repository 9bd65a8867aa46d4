"""Assembly of a training run: every part is built here, from the config, in one place."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.alignment.termination import Trigger, make_trigger
from pipeline.checkpoints.integrity import NonFiniteCheckpointError
from pipeline.checkpoints.state import CheckpointState, load_optimizer, load_weights, read_state
from pipeline.checkpoints.store_identity import check_store_identity, store_identity
from pipeline.distributed.process_group import ProcessGroup
from pipeline.distributed.signals import PollRequest
from pipeline.runs.directory import write_config
from pipeline.runs.metrics import MetricsLog
from pipeline.store import BatchLoader, SampleOrder, Store
from pipeline.store.reading.batch_loader import loader_options
from pipeline.store.reading.holdout import RankedSamples, ranked_samples
from pipeline.train.finite import all_finite
from pipeline.train.gradient_probe import GradientProbe
from pipeline.train.profiler import StepTrace
from pipeline.train.step_meter import PhaseClock, StepMeter, Throughput
from pipeline.train.stop_consensus import StopConsensus
from pipeline.train.trainer import Trainer
from schemas.errors import UserError
from schemas.run import RunConfig

if TYPE_CHECKING:
    from pipeline.train.validation.loss import ValidationLoss
    from pipeline.train.validation.runner import Validator


@dataclass(frozen=True)
class Progress:
    """Progress of a run before this process, from the checkpoint that it continues."""

    metrics_rows: int = 0
    bytes_read: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """Per stream: bytes read before and after the termination."""
    validated_step: int | None = None
    """Last step whose validation was finished."""
    damaged: Mapping[int, int] = field(default_factory=dict)
    """Epoch from which on each damaged shard is left out."""

    @classmethod
    def of(cls, state: CheckpointState) -> Progress:
        damaged = state.data.get("damaged", {})
        return cls(
            state.metrics_rows,
            state.bytes_read,
            state.step if state.looked else None,
            {int(shard): epoch for shard, epoch in damaged.items()},
        )


@dataclass(frozen=True)
class RunParts:
    """The parts of a training run on one worker."""

    config: RunConfig
    store: Store
    folder: Path
    group: ProcessGroup
    trainer: Trainer
    trigger: Trigger
    identity: dict[str, Any]
    """``store_identity`` of the store."""
    progress: Progress
    loader: BatchLoader
    teacher_streams: list[str]
    """Streams that the termination closes."""
    probe: GradientProbe
    meter: StepMeter
    throughput: Throughput
    clock: PhaseClock
    trace: StepTrace
    consensus: StopConsensus
    validation_loss: ValidationLoss | None
    validator: Validator | None
    metrics: MetricsLog | None
    """Only on the main rank."""

    def close(self) -> None:
        """Stop threads and close files."""
        self.loader.close()
        self.trainer.close()
        if self.metrics is not None:
            self.metrics.close()


def build_run(
    config: RunConfig,
    folder: Path,
    group: ProcessGroup,
    checkpoint: AbstractContextManager[Path | None],
    poll: PollRequest,
    *,
    resumes: bool = False,
) -> RunParts:
    """Build a run from a config that ``resolve_run`` has checked; every rank calls it.

    ``checkpoint`` gives the folder of a verified checkpoint to continue from, or None, and is
    entered only while that is read; with ``resumes`` it must not be None, because the weights are
    not initialised. Raises ``UserError`` where the checkpoint was trained on another store.
    """
    assert config.store is not None
    store = Store.open(config.store)
    trigger = make_trigger(config.alignment.termination, config.alignment)
    trainer = Trainer(
        config, store, group, measure_entropy=trigger.needs_entropy, initialise=not resumes
    )
    meter = StepMeter(group, config.global_batch, trainer.module.losses)
    tokens, captions = trainer.inputs.class_tokens, trainer.inputs.captions
    identity = store_identity(
        store,
        config.alignment,
        None if tokens is None else tokens.stream,
        None if captions is None else (captions.stream, captions.encoder_info),
    )
    progress = Progress()
    with checkpoint as path:
        if path is not None:
            state = read_state(path)
            check_store_identity(
                state.store, identity, aligned=state.termination is None, where=path
            )
            _load_trainer(path, state, trainer)
            trigger.load_state_dict(state.trigger, group.scatter_saved)
            meter.load_state_dict(state.meter)
            progress = Progress.of(state)
        elif resumes:
            raise UserError(
                f"run '{config.name}': its checkpoint was removed while it was to be read; run the "
                "same command again"
            )
    shards = store.index().samples_per_shard
    held_out = None
    if config.data.holdout:
        held_out = ranked_samples(store, config.data.holdout, group)
        if len(held_out.ranks) == sum(shards):
            raise UserError(
                f"data.holdout {config.data.holdout:g} leaves none of the {sum(shards)} samples of "
                f"{store.shown_url} to train on"
            )
    order = SampleOrder(
        config.seed,
        shards,
        config.data.window,
        dict(progress.damaged),
        None if held_out is None else held_out.by_shard(),
    )
    validation_loss = _open_validation_loss(trainer, store, held_out)
    validator = _open_validator(trainer, store, folder)
    # last, because nothing may fail once threads read ahead and a log is open
    metrics = None
    if group.is_main:
        metrics = MetricsLog(folder, config, start_step=trainer.step, rows=progress.metrics_rows)
        write_config(folder, config)
    loader, teacher_streams = _open_loader(config, store, order, group, trainer, trigger)
    return RunParts(
        config=config,
        store=store,
        folder=folder,
        group=group,
        trainer=trainer,
        trigger=trigger,
        identity=identity,
        progress=progress,
        loader=loader,
        teacher_streams=teacher_streams,
        probe=GradientProbe(trainer, store, order),
        meter=meter,
        throughput=Throughput(config.student, group),
        clock=PhaseClock(),
        trace=StepTrace(folder, group, config.profile),
        consensus=StopConsensus(group, poll),
        validation_loss=validation_loss,
        validator=validator,
        metrics=metrics,
    )


def _load_trainer(folder: Path, state: CheckpointState, trainer: Trainer) -> None:
    """Files were verified by the process that selected the checkpoint: none is hashed again."""
    with ThreadPoolExecutor(1, thread_name_prefix="load") as pool:
        optimizer = pool.submit(load_optimizer, folder)  # half of the bytes
        for name, module in trainer.modules().items():
            load_weights(folder, name, module)
    trainer.load_state_dict(
        {
            "step": state.step,
            "termination": state.termination,
            "optimizer": optimizer.result(),
        }
    )
    for name, tensors in trainer.tensors().items():
        broken = ~all_finite(tensors, trainer.group.device)
        if trainer.group.sum(broken.float()):  # a rank may hold a slice only
            raise NonFiniteCheckpointError(folder, f"its {name} is")


def _open_loader(
    config: RunConfig,
    store: Store,
    order: SampleOrder,
    group: ProcessGroup,
    trainer: Trainer,
    trigger: Trigger,
) -> tuple[BatchLoader, list[str]]:
    """The loader and its teacher streams, which are not read ahead beyond a known last step."""
    teacher_streams = trainer.teacher_streams
    last = trigger.known_step()
    needed_until = {} if last is None else dict.fromkeys(teacher_streams, last)
    loader = BatchLoader(
        store,
        [*trainer.inputs.streams, *teacher_streams],
        order,
        global_batch=config.global_batch,
        rank=group.rank,
        world_size=group.world_size,
        start_step=trainer.step,
        needed_until=needed_until,
        agree=group.union,
        allocate=trainer.inputs.feed.allocate,
        caption_drop=config.diffusion.label_drop,
        **loader_options(config.data),
    )
    return loader, teacher_streams


def _open_validation_loss(
    trainer: Trainer, store: Store, held_out: RankedSamples | None
) -> ValidationLoss | None:
    if trainer.config.validation.every is None:
        return None
    from pipeline.train.validation.loss import ValidationLoss

    return ValidationLoss(trainer, store, held_out)


def _open_validator(trainer: Trainer, store: Store, folder: Path) -> Validator | None:
    config, captions = trainer.config, trainer.inputs.captions
    if config.samples.every is None and config.samples.evaluate.images is None:
        return None
    from pipeline.train.validation.runner import Validator  # diffusers takes seconds to import

    encoder = None if captions is None else captions.encoder
    return Validator(config, store.manifest, trainer.group, folder, encoder)
