"""One training step, and the one step boundary at which the teacher is let go."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.alignment.aligned_student import LOSSES, AlignedStudent
from pipeline.alignment.losses import Targets
from pipeline.distributed.process_group import ProcessGroup
from pipeline.models.ema import Ema
from pipeline.models.projector import Projector
from pipeline.store import Batch, Store
from pipeline.targets.sources import TargetSource, aligned_heads, open_targets, wanted_targets
from pipeline.train.device_transfer import DevicePrefetcher
from pipeline.train.noise import NoisePrefetcher, SampleNoise
from schemas.errors import UserError
from schemas.run import RunConfig

NO_TARGETS = Targets(None, None)


class Inputs(NamedTuple):
    """What a step feeds to the student (B samples), as its objective makes it."""

    noisy: Tensor
    """(B, C, h, w) noisy latents."""
    time: Tensor
    """(B,) the time that the network is told."""
    labels: Tensor
    """(B,) classes; ``num_classes`` where the label was dropped."""
    target: Tensor
    """(B, C, h, w) the denoising target."""


class Trainer:
    """Owns the weights, their averages and the optimizer."""

    def __init__(
        self,
        config: RunConfig,
        store: Store,
        parallel: ProcessGroup,
        *,
        measure_entropy: bool = False,
    ) -> None:
        """``measure_entropy``: also measure the teacher's attention entropy, for a trigger."""
        self.config = config
        self.manifest = manifest = store.manifest
        self.parallel = parallel
        self.step = 0
        self.aligned = config.alignment.active
        self.termination: dict[str, Any] | None = None

        teacher = None
        if config.alignment.active:
            teacher = manifest.teacher_stream(config.alignment.stream)[1].teacher
        self._heads = aligned_heads(config.student, teacher) if teacher else 0
        torch.manual_seed(config.seed)
        self.module = AlignedStudent(
            config.student,
            config.alignment,
            teacher_width=teacher.width if teacher else 0,
            heads=self._heads,
            teacher_grid=teacher.grid if teacher else None,
            diffusion=config.diffusion,
            measure_entropy=measure_entropy,
            fused=config.compute.attention_loss == "fused",
        ).to(parallel.device)
        self.ema = Ema(self.module.student, config.ema_decay)
        self.projector: Projector | None = self.module.projector
        self.projector_ema = Ema(self.projector, config.ema_decay) if self.projector else None
        self._store = store
        self._targets: TargetSource | None = None
        self.optimizer = _make_optimizer(self.module, config)
        self.feed = DevicePrefetcher(parallel.device)
        self.draws = NoisePrefetcher(
            config.seed,
            config.student.latent_shape,
            config.diffusion.label_drop,
            parallel.device,
        )
        if self._compiles:
            self.module.compile_parts()
        self.wrapped: nn.Module = parallel.wrap(self.module)

    def train_step(self, batch: Batch) -> Tensor:
        """One optimizer step on this rank's slice of a global batch.

        Returns, on the device, this rank's sums of ``LOSSES`` and the global gradient norm before
        clipping: (5,). Gradients are means over the samples of the global batch, however unequal
        the ranks' slices, and however many micro-batches each of them makes of its own.
        """
        config = self.config
        draws = self.draws(batch.positions)
        self.draws.expect(batch.positions + config.global_batch)
        parts = list(split_batch(batch, draws, config.workers.micro_batch))
        losses = torch.zeros(len(LOSSES), device=self.parallel.device)
        for number, part in enumerate(parts, start=1):
            # Ranks with more parts than others add them up alone; each averages exactly once.
            with self.parallel.no_sync(self.wrapped, on=number == len(parts)):
                losses += self._accumulate(*part)
        norm = torch.nn.utils.clip_grad_norm_(
            self.module.parameters(), config.optimizer.max_grad_norm
        )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.update(self.module.student)
        if self.module.projector is not None and self.projector_ema is not None:
            self.projector_ema.update(self.module.projector)
        self.step += 1
        return torch.cat([losses, norm.detach().view(1)])

    def _accumulate(self, batch: Batch, draws: SampleNoise) -> Tensor:
        """Add the gradients of some samples; their sums of ``LOSSES``, (4,)."""
        losses = self.losses(self.wrapped, self.inputs(batch, draws), self.targets_of(batch))
        # DDP divides the sum of gradients by the number of ranks
        total = self.total(losses) * (self.parallel.world_size / self.config.global_batch)
        total.backward()
        return losses.detach()

    def losses(self, module: nn.Module, inputs: Inputs, targets: Targets) -> Tensor:
        """Sums over the samples of what ``LOSSES`` names, (4,), from ``module``: the wrapped one,
        or the bare one where no gradients are to be averaged."""
        dtype = self.autocast_dtype
        with torch.autocast(self.parallel.device.type, dtype, enabled=dtype is not None):
            losses: Tensor = module(*inputs, targets)
        return losses

    def alignment_loss(self, losses: Tensor) -> Tensor:
        """The weighted alignment losses (HASTE section 2.4)."""
        alignment = self.config.alignment
        return alignment.feature_weight * losses[1] + alignment.attention_weight * losses[2]

    def total(self, losses: Tensor) -> Tensor:
        """What is minimised."""
        return losses[0] + self.alignment_loss(losses)

    def terminate(self, evidence: Mapping[str, Any]) -> None:
        """Let the teacher go before step ``self.step``: taps off, the projector out of the graph,
        DDP and the optimizer. The projector stays here for checkpoints. ``evidence`` is why; a
        resumed run passes what its checkpoint says."""
        self.optimizer.zero_grad(set_to_none=True)
        self.module.release_alignment()
        self.aligned, self._targets = False, None
        self.termination = {"terminated_at_step": self.step, **evidence}
        for group in self.optimizer.param_groups[1:]:
            for parameter in group["params"]:
                self.optimizer.state.pop(parameter, None)
        del self.optimizer.param_groups[1:]
        if self.parallel.world_size > 1:
            self.wrapped = self.module  # frees the old reducer and its hooks before a new one
            gc.collect()
            self.wrapped = self.parallel.wrap(self.module)

    @property
    def _compiles(self) -> bool:
        choice = self.config.compute.compile
        return choice == "on" or (choice == "auto" and self.parallel.device.type == "cuda")

    @property
    def projector_ema_step(self) -> int:
        """The step up to which the projector's average is up to date: from the termination on, it
        is brought up to date only where it is read."""
        if self.termination is None:
            return self.step
        return int(self.termination["terminated_at_step"])

    @property
    def targets(self) -> TargetSource | None:
        """Where the targets come from, opened when first asked for: a run that is resumed after
        the termination never loads what the cut left of the teacher. None once it has gone."""
        if self.aligned and self._targets is None:
            alignment = self.config.alignment
            wanted = wanted_targets(alignment, self._heads)
            self._targets = open_targets(
                self._store,
                alignment.stream,
                wanted,
                self.parallel.device,
                compiled=self._compiles,
            )
        return self._targets

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        """None: plain float32."""
        name = self.config.precision
        if name == "auto":
            name = "bfloat16" if self.parallel.device.type == "cuda" else "float32"
        return None if name == "float32" else getattr(torch, name)

    def inputs(
        self, batch: Batch, draws: SampleNoise | None = None, *, time: float | None = None
    ) -> Inputs:
        """What the student sees of a batch, on the device; ``draws`` are made if not given, and
        ``time`` replaces the drawn times."""
        stored = batch.columns["latents"]
        classes = self.manifest.dataset.num_classes
        if stored["label"].min(initial=0) < 0 or stored["label"].max(initial=0) >= classes:
            raise UserError(  # on a GPU an index out of range kills the process
                f"the store holds a label outside its {classes} classes: it is damaged"
            )
        columns = self.feed(_tensors(stored))
        drawn = SampleNoise(**self.feed((draws or self.draws(batch.positions))._asdict()))
        vae = self.manifest.autoencoder
        latents = columns["mean"].float() + columns["std"].float() * drawn.posterior
        latents = (latents - vae.shift_factor) * vae.scaling_factor
        labels = torch.where(drawn.drop_label, self.config.student.num_classes, columns["label"])
        t = drawn.t
        if time is not None:
            t = torch.full_like(t, time)
        noisy, told, target = self.module.objective.corrupt(latents, drawn.noise, t)
        return Inputs(noisy, told, labels, target)

    def targets_of(self, batch: Batch) -> Targets:
        """What the student is pulled towards, on the device."""
        source = self.targets
        if source is None:
            return NO_TARGETS
        return source(self.feed(_tensors(batch.columns[source.stream])))

    def close(self) -> None:
        """End its thread."""
        self.draws.close()


def split_batch(
    batch: Batch, draws: SampleNoise, size: int | None
) -> Iterator[tuple[Batch, SampleNoise]]:
    """The batch and its draws in parts of ``size`` samples, the last one smaller; None: in one."""
    count = len(batch.positions)
    size = max(1, count) if size is None else size
    for begin in range(0, max(1, count), size):
        part = slice(begin, begin + size)
        columns = {
            stream: {name: array[part] for name, array in arrays.items()}
            for stream, arrays in batch.columns.items()
        }
        yield (
            Batch(batch.step, batch.positions[part], columns),
            SampleNoise(*(values[part] for values in draws)),
        )


def _tensors(columns: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    return {name: torch.from_numpy(array) for name, array in columns.items()}


def _make_optimizer(module: AlignedStudent, config: RunConfig) -> torch.optim.AdamW:
    """AdamW with the student in the first group and the projector in a second, which goes."""
    groups = [{"params": list(module.student.parameters())}]
    if module.projector is not None:
        groups.append({"params": list(module.projector.parameters())})
    options = config.optimizer
    return torch.optim.AdamW(
        groups,
        lr=options.learning_rate,
        betas=options.betas,
        weight_decay=options.weight_decay,
        eps=options.eps,
        # torch takes one of the two at most; with neither it may choose by itself
        fused=config.compute.optimizer == "fused",
        foreach=False,
    )
