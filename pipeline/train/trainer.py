"""One training step, and the termination of the alignment at a step boundary."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.alignment.aligned_student import AlignedStudent, AlignedTeacher
from pipeline.alignment.losses import Targets
from pipeline.checkpoints.state import projector_files
from pipeline.distributed.process_group import ProcessGroup
from pipeline.distributed.sharding import local, save_whole, shard
from pipeline.models import MMDiT, Student, make_student
from pipeline.models.ema import Ema
from pipeline.models.factory import Uninitialised
from pipeline.precision import precision_dtype, use_deterministic_kernels
from pipeline.store import Batch, Store
from pipeline.targets.class_token import ClassTokens
from pipeline.targets.sources import TargetSource, aligned_heads, open_targets, wanted_targets
from pipeline.train.captions import CaptionInput
from pipeline.train.compile_limit import report_compile_limit
from pipeline.train.inputs import InputBuilder, Inputs, Uploaded
from pipeline.train.optimizer import ClippedAdamW
from pipeline.train.step_graph import StepGraph
from schemas.errors import UserError
from schemas.run import RunConfig


class Trainer:
    """Owner of the weights, their averages and the optimizer."""

    def __init__(
        self,
        config: RunConfig,
        store: Store,
        group: ProcessGroup,
        *,
        measure_entropy: bool = False,
        initialise: bool = True,
    ) -> None:
        """``measure_entropy``: also measure the teacher's attention entropy, for a trigger. Not
        ``initialise``: all weights will be loaded."""
        self.config = config
        self.group = group
        self.step = 0
        self.aligned = config.alignment.active
        self.factor = 1.0
        """Factor of the alignment's weights in the next step, see ``alignment_factor``. A Python
        number: it needs no copy to the device and no graph of its own."""
        self.termination: dict[str, Any] | None = None
        self.skipped: Tensor | None = None
        """If the last step was skipped: bool, on the device, equal on all ranks. None unless
        ``train.on_nan`` is skip_step."""

        self.copied: torch.cuda.Event | None = None
        """End of a copy of the state, which the next update waits for on the device."""

        student, manifest = config.student, store.manifest
        teachers = [manifest.teacher_stream(s.stream)[1].teacher for s in config.alignment.streams]
        first, *others = [
            AlignedTeacher(teacher.width, aligned_heads(student, teacher), teacher.grid)
            for teacher in teachers
        ] or [AlignedTeacher(0, 0)]
        class_tokens = captions = None
        class_streams: list[int] = []
        if student.class_token is not None:
            class_tokens = ClassTokens(manifest, config.diffusion.class_stream)
            class_streams = class_tokens.aligned_streams(config.alignment, manifest)
        if student.family == "MMDiT":
            captions = CaptionInput(store, config.diffusion.text_stream, group.device)
        if config.compute.deterministic and group.device.type == "cuda":
            use_deterministic_kernels()
        torch.manual_seed(config.seed)
        with nullcontext() if initialise else Uninitialised():
            self.module = AlignedStudent(
                student,
                config.alignment,
                teacher_width=first.width,
                heads=first.heads,
                teacher_grid=first.grid,
                others=others,
                diffusion=config.diffusion,
                measure_entropy=measure_entropy,
                fused=config.compute.attention_loss == "fused",
                class_streams=class_streams,
            ).to(group.device)
        if isinstance(self.module.student, MMDiT) and captions is not None:
            self.module.student.null_context.copy_(captions.null)
        self.inputs = InputBuilder(
            config, manifest, group.device, self.module.objective, class_tokens, captions
        )
        self.ema = Ema(self.module.student, config.ema_decay)
        self.projectors: dict[int, nn.Module] = dict(self.module.projectors())
        """By the number of the stream, also after the termination."""
        self.projector_emas = {
            number: Ema(projector, config.ema_decay)
            for number, projector in self.projectors.items()
        }
        self._store = store
        self._targets: tuple[TargetSource, ...] | None = None
        self._sharded = config.compute.shard == "fsdp2" and group.world_size > 1
        if self._compiles:
            report_compile_limit()
            self.module.compile_parts(sharded=self._sharded)
        if self._sharded:
            self._shard()
        self.optimizer = ClippedAdamW(self.module, config, group.device, sharded=self._sharded)
        self.wrapped: nn.Module = group.wrap(self.module)
        self._graph: StepGraph | None = None
        if config.compute.cuda_graphs and group.device.type == "cuda":
            if group.world_size > 1:
                raise UserError("compute.cuda_graphs is for one worker: set it to false")
            self._graph = StepGraph(self._step)

    def train_step(self, batch: Batch) -> Tensor:
        """One optimizer step on this rank's slice of a global batch.

        Returns, on the device, this rank's sums of ``module.losses`` and the global gradient norm
        before clipping: (5,), more with several teacher streams. Gradients are means over the
        samples of the global batch, however unequal the ranks' slices, and however many
        micro-batches each of them makes of its own.
        """
        split = self.inputs.micro_batches(batch)
        streams = dict.fromkeys((*self.inputs.streams, *self.teacher_streams))
        parts = (self.inputs.upload(*part, streams) for part in split)
        if self._graph is None:
            result, self.skipped = self._step(parts, len(split))
        else:
            self._wait_for_copy()
            result, self.skipped = self._graph(list(parts), self.factor)
        self.step += 1
        return result

    def _step(
        self, parts: Iterable[Uploaded], count: int | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """The device's work of a step: what ``train_step`` returns, and ``skipped``. ``count``:
        number of parts, where there are other workers."""
        losses = torch.zeros(len(self.module.losses), device=self.group.device)
        for number, part in enumerate(parts, start=1):
            # Ranks may have unequal numbers of parts; each averages once, with its last part.
            with self.group.sync_gradients(self.wrapped, enabled=number == count):
                losses += self._accumulate(part)
        norm = self.optimizer.clip_gradients(self.module.parameters())
        result = torch.cat([losses, norm.view(1)])
        skipped = None
        if self.config.train.on_nan == "skip_step":
            broken = (~result.isfinite()).any().float()
            skipped = self.group.sum(broken) > 0
        self._wait_for_copy()
        capturing = self._graph is not None and self._graph.capturing
        self.optimizer.update(skipped, capturing=capturing)
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.update(self.module.student, skipped)
        for number, projector in self.module.projectors():
            self.projector_emas[number].update(projector, skipped)
        return result, skipped

    def _wait_for_copy(self) -> None:
        """Let the device wait for a copy of the state that is being made."""
        if self.copied is not None:
            self.copied.wait()
            self.copied = None

    def _accumulate(self, part: Uploaded) -> Tensor:
        """Add the gradients of some samples; their sums of ``module.losses``."""
        losses = self.losses(
            self.wrapped, self.inputs.build(part), self._targets_from(part.columns)
        )
        # DDP divides the sum of gradients by the number of ranks
        total = self.total(losses) * (self.group.world_size / self.config.global_batch)
        total.backward()
        return losses.detach()

    def losses(self, module: nn.Module, inputs: Inputs, targets: Sequence[Targets]) -> Tensor:
        """Sums over the samples of what ``module.losses`` names, from ``module``: the wrapped one,
        or the bare one where no gradients are to be averaged."""
        dtype = self.autocast_dtype
        with torch.autocast(self.group.device.type, dtype, enabled=dtype is not None):
            losses: Tensor = module(*inputs[:-1], *targets, class_token=inputs.class_token)
        return losses

    def denoising_loss(self, losses: Tensor) -> Tensor:
        """That of the latents, and of the class token with its weight (REG, arXiv 2507.01467)."""
        if self.inputs.class_tokens is None:
            return losses[0]
        return losses[0] + self.config.diffusion.class_weight * losses[-1]

    def alignment_loss(self, losses: Tensor) -> Tensor:
        """The weighted alignment losses (HASTE section 2.4)."""
        alignment = self.config.alignment
        return alignment.feature_weights * losses[1] + alignment.attention_weights * losses[2]

    def total(self, losses: Tensor) -> Tensor:
        """The loss that is minimised."""
        alignment = self.alignment_loss(losses)
        weighted = alignment if self.factor == 1 else self.factor * alignment
        return self.denoising_loss(losses) + weighted

    def terminate(self, evidence: Mapping[str, Any]) -> None:
        """End the alignment before step ``self.step``.

        Taps are off; projectors leave the graph, DDP and the optimizer, and stay here for
        checkpoints; the teachers' tails and pinned memory are freed. ``evidence``: the
        trigger's observation; a resumed run passes that of its checkpoint.
        """
        self.optimizer.zero_grad(set_to_none=True)
        if self._graph is not None:
            self._graph.drop()
        self.module.release_alignment()
        self.aligned, self._targets = False, None
        self.termination = {"terminated_at_step": self.step, **evidence}
        self.optimizer.drop_projectors()
        if self.group.world_size > 1 and not self._sharded:
            self.wrapped = self.module  # frees the old reducer and its hooks before a new one
            gc.collect()
            self.wrapped = self.group.wrap(self.module)
        self.inputs.feed.release()

    def modules(self) -> dict[str, nn.Module]:
        """Modules that a checkpoint holds, by the name of their file."""
        modules: dict[str, nn.Module] = {"model": self.module.student, "ema": self.ema.module}
        for number, projector in self.projectors.items():
            # The average is saved as of the termination, because closing the gap twice would round
            # twice and a resumed run would differ.
            name, average = projector_files(number)
            modules[name] = projector
            modules[average] = self.projector_emas[number].module
        return modules

    def averaged_student(self) -> Student:
        """The student with averaged weights, for sampling: a whole copy where they are sharded.
        Every rank calls it."""
        return self._whole(self.ema.module)

    def trained_student(self) -> Student:
        """Likewise, with weights as trained; not to be changed."""
        return self._whole(self.module.student)

    def _whole(self, module: Student) -> Student:
        if not self._sharded:
            return module
        with torch.random.fork_rng(devices=[]):
            student = make_student(self.config.student).to(self.group.device)
        student.load_state_dict(module.state_dict())
        return student.requires_grad_(False).eval()

    def _shard(self) -> None:
        """Divide weights and averages. Ranks gather weights together, so that all must take
        equally many forward passes."""
        config, workers = self.config, self.group.world_size
        shares = {config.global_batch // workers, -(-config.global_batch // workers)}
        size = config.workers.micro_batch or config.global_batch
        if len({-(-share // size) for share in shares}) > 1:
            raise UserError(
                f"compute.shard fsdp2 needs equally many micro-batches of all workers: {workers} "
                f"share {config.global_batch} samples, {min(shares)} or {max(shares)} each, in "
                f"parts of {size}; choose another --workers.micro-batch or --global-batch"
            )
        shard(self.module, self.module.parts, self.group.device)
        shard(self.ema.module, (), self.group.device)
        for average in self.projector_emas.values():
            shard(average.module, (), self.group.device)
        for module in self.modules().values():
            save_whole(module)

    def tensors(self) -> dict[str, list[Tensor]]:
        """Tensors of everything that a checkpoint holds, by a name for messages; where they are
        sharded, this rank's slices."""
        found = {
            f"{name.replace('_', ' ')} weights": [
                local(tensor.data) for tensor in (*module.parameters(), *module.buffers())
            ]
            for name, module in self.modules().items()
        }
        states = self.optimizer.state.values()
        moments = [local(value) for state in states for value in state.values()]
        return {**found, "optimizer state": moments}

    def state_dict(self) -> dict[str, Any]:
        """State beside the modules: step, termination and AdamW's state."""
        return {
            "step": self.step,
            "termination": self.termination,
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from ``state_dict()``, once the modules have been loaded."""
        self.step = state["step"]
        if state["termination"] is not None:
            self.terminate(state["termination"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self._graph is not None:
            self._graph.drop()
            if not self.optimizer.fused:
                raise UserError(
                    "compute.cuda_graphs needs the fused optimizer, and the checkpoint was trained "
                    "with the plain one: set --compute.cuda-graphs false"
                )

    @property
    def _compiles(self) -> bool:
        choice = self.config.compute.compile
        return choice == "on" or (choice == "auto" and self.group.device.type == "cuda")

    @property
    def targets(self) -> tuple[TargetSource, ...]:
        """Sources of the targets of each stream, opened on first use, because a run that is resumed
        after the termination must not load the teachers' tails. Empty after the termination."""
        if not self.aligned:
            return ()
        if self._targets is None:
            self._targets = tuple(
                open_targets(
                    self._store,
                    stream.options.stream,
                    wanted_targets(stream.options, stream.heads),
                    self.group.device,
                    compiled=self._compiles,
                )
                for stream in self.module.streams
            )
        return self._targets

    @property
    def teacher_streams(self) -> list[str]:
        """Names of the streams that the targets are read from, each once."""
        return list(dict.fromkeys(source.stream for source in self.targets))

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        """Autocast dtype; None: plain float32."""
        dtype = precision_dtype(self.config.precision, self.group.device.type)
        return None if dtype == torch.float32 else dtype

    def targets_of(self, batch: Batch) -> list[Targets]:
        """Alignment targets of a batch for each stream, on the device."""
        return self._targets_from(self.inputs.upload_columns(batch, self.teacher_streams))

    def _targets_from(self, columns: Mapping[str, Mapping[str, Tensor]]) -> list[Targets]:
        return [source(columns[source.stream]) for source in self.targets]

    def close(self) -> None:
        """End the thread that draws noise."""
        self.inputs.draws.close()
