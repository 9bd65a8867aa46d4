"""One training step, and the termination of the alignment at a step boundary."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.alignment.aligned_student import AlignedStudent, AlignedTeacher, ClassToken
from pipeline.alignment.losses import Targets
from pipeline.checkpoints.state import projector_files
from pipeline.diffusion.normalisation import normalisation_of, normalise
from pipeline.diffusion.times import times_of
from pipeline.distributed.process_group import ProcessGroup
from pipeline.distributed.sharding import load_whole_optimizer, local, save_whole, shard, whole
from pipeline.models import MMDiT, Student, make_student
from pipeline.models.ema import Ema
from pipeline.models.factory import Uninitialised
from pipeline.precision import precision_dtype, use_deterministic_kernels
from pipeline.store import Batch, Store
from pipeline.targets.class_token import ClassTokens
from pipeline.targets.sources import TargetSource, aligned_heads, open_targets, wanted_targets
from pipeline.train.captions import CaptionInput
from pipeline.train.compile_limit import report_compile_limit
from pipeline.train.device_transfer import DevicePrefetcher
from pipeline.train.noise import NoisePrefetcher, SampleNoise
from pipeline.train.step_graph import StepGraph
from schemas.errors import UserError
from schemas.run import RunConfig


class Inputs(NamedTuple):
    """Inputs and target of the student for B samples, made by its objective."""

    noisy: Tensor
    """(B, C, h, w) noisy latents."""
    time: Tensor
    """(B,) time that the network receives."""
    condition: Tensor
    """(B,) classes, ``num_classes`` where the label was dropped; or text embeddings (B, T, E),
    those of the empty caption where the caption was dropped."""
    target: Tensor
    """(B, C, h, w) the denoising target."""
    class_token: ClassToken | None = None
    """None for a student without a class token."""


class Uploaded(NamedTuple):
    """Stored arrays and draws of B samples, on the device."""

    columns: dict[str, dict[str, Tensor]]
    """Arrays (B, ...) of each stream."""
    draws: SampleNoise


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
        self.manifest = manifest = store.manifest
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

        teachers = [
            manifest.teacher_stream(options.stream)[1].teacher
            for options in config.alignment.streams
        ]
        aligned = [
            AlignedTeacher(teacher.width, aligned_heads(config.student, teacher), teacher.grid)
            for teacher in teachers
        ]
        self._heads = [teacher.heads for teacher in aligned]
        self.class_tokens: ClassTokens | None = None
        """Source of the class tokens, in both phases; None for a student without them."""
        class_streams: list[int] = []
        if config.student.class_token is not None:
            self.class_tokens = ClassTokens(manifest, config.diffusion.class_stream)
            own = manifest.class_streams[self.class_tokens.stream].teacher
            class_streams = [
                number
                for number, (teacher, options) in enumerate(
                    zip(teachers, config.alignment.streams, strict=True)
                )
                if teacher.same_network(own)
                # a convolution has no place for it, and the token is that after the final norm
                and options.projector == "mlp"
                and options.target == "final"
            ]
        self.captions: CaptionInput | None = None
        """Source of the text embeddings, in both phases; None for other students than MMDiT."""
        if config.student.family == "MMDiT":
            self.captions = CaptionInput(store, config.diffusion.text_stream, group.device)
        first = aligned[0] if aligned else AlignedTeacher(0, 0)
        if config.compute.deterministic and group.device.type == "cuda":
            use_deterministic_kernels()
        torch.manual_seed(config.seed)
        with nullcontext() if initialise else Uninitialised():
            self.module = AlignedStudent(
                config.student,
                config.alignment,
                teacher_width=first.width,
                heads=first.heads,
                teacher_grid=first.grid,
                others=aligned[1:],
                diffusion=config.diffusion,
                measure_entropy=measure_entropy,
                fused=config.compute.attention_loss == "fused",
                class_streams=class_streams,
            ).to(group.device)
        if isinstance(self.module.student, MMDiT) and self.captions is not None:
            self.module.student.null_context.copy_(self.captions.null)
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
        self.optimizer = _make_optimizer(self.module, config)
        if self._sharded:
            load_whole_optimizer(self.optimizer)
        self.feed = DevicePrefetcher(group.device)
        self.draws = NoisePrefetcher(
            config.seed,
            config.student.latent_shape,
            config.diffusion.label_drop,
            group.device,
            partial(times_of, config.diffusion),
            class_token=config.student.class_token,
        )
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
        config = self.config
        draws = self.draws(batch.positions)
        self.draws.expect(batch.positions + config.global_batch)
        split = list(split_batch(batch, draws, config.workers.micro_batch))
        streams = dict.fromkeys((*self.data_streams, *self.teacher_streams))
        parts = (self.upload(*part, streams) for part in split)
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
        result = torch.cat([losses, self._clip_gradients().view(1)])
        skipped = None
        if self.config.train.on_nan == "skip_step":
            broken = (~result.isfinite()).any().float()
            skipped = self.group.sum(broken) > 0
        self._wait_for_copy()
        self._optimizer_step(skipped)
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

    def _clip_gradients(self) -> Tensor:
        """The global norm of the gradients, which are then clipped to ``max_grad_norm``.

        On a GPU the fused optimizer divides by ``grad_scale`` where it reads the gradients anyway.
        This rounds a quotient instead of a product; unclipped gradients keep every bit.
        """
        limit = self.config.optimizer.max_grad_norm
        if not self._clips_in_optimizer:
            norm = torch.nn.utils.clip_grad_norm_(self.module.parameters(), limit)
            return whole(norm.detach())
        gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        scale = ((norm + 1e-6) / limit).clamp(min=1.0)  # inverse of clip_grad_norm_'s factor
        self.optimizer.grad_scale = scale  # type: ignore[attr-defined]
        return norm

    @property
    def _clips_in_optimizer(self) -> bool:
        fused = self.optimizer.param_groups[0]["fused"]
        return bool(fused) and self.group.device.type == "cuda" and not self._sharded

    def _optimizer_step(self, skipped: Tensor | None) -> None:
        """AdamW's step, without effect where ``skipped``."""
        if skipped is not None:
            if self.optimizer.param_groups[0]["fused"]:  # as a gradient scaler does
                self.optimizer.found_inf = skipped.float()  # type: ignore[attr-defined]
            elif skipped:  # waits for the device, as the plain form has no such flag
                return
        capturing = self._graph is not None and self._graph.capturing
        groups = self.optimizer.param_groups
        for group in groups:  # the fused kernel always is; a flag that is left would be saved
            group["capturable"] = capturing
        self.optimizer.step()
        for group in groups:
            group["capturable"] = False

    def _accumulate(self, part: Uploaded) -> Tensor:
        """Add the gradients of some samples; their sums of ``module.losses``."""
        losses = self.losses(self.wrapped, self._inputs(part), self._targets_from(part.columns))
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
        if self.class_tokens is None:
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
        for group in self.optimizer.param_groups[1:]:
            for parameter in group["params"]:
                self.optimizer.state.pop(parameter, None)
        del self.optimizer.param_groups[1:]
        if self.group.world_size > 1 and not self._sharded:
            self.wrapped = self.module  # frees the old reducer and its hooks before a new one
            gc.collect()
            self.wrapped = self.group.wrap(self.module)
        self.feed.release()

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
            if not self.optimizer.param_groups[0]["fused"]:
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
                    options.stream,
                    wanted_targets(options, heads),
                    self.group.device,
                    compiled=self._compiles,
                )
                for options, heads in zip(self.config.alignment.streams, self._heads, strict=True)
            )
        return self._targets

    @property
    def data_streams(self) -> list[str]:
        """Names of the streams that are read in both phases."""
        sources = (self.class_tokens, self.captions)
        return ["latents", *(source.stream for source in sources if source is not None)]

    @property
    def teacher_streams(self) -> list[str]:
        """Names of the streams that the targets are read from, each once."""
        return list(dict.fromkeys(source.stream for source in self.targets))

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        """Autocast dtype; None: plain float32."""
        dtype = precision_dtype(self.config.precision, self.group.device.type)
        return None if dtype == torch.float32 else dtype

    def upload(self, batch: Batch, draws: SampleNoise, streams: Iterable[str]) -> Uploaded:
        """Start to copy ``streams`` of a batch and its draws to the device. Raises ``UserError``
        for labels and tokens that the networks do not have."""
        stored = batch.columns["latents"]
        classes = self.manifest.dataset.num_classes
        if stored["label"].min(initial=0) < 0 or stored["label"].max(initial=0) >= classes:
            raise UserError(  # an index out of range ends a process on a GPU
                f"the store holds a label outside its {classes} classes: it is damaged"
            )
        if self.captions is not None:
            self.captions.check(batch.columns[self.captions.stream])
        columns = {name: self.feed(_tensors(batch.columns[name])) for name in streams}
        given = {k: values for k, values in draws._asdict().items() if values is not None}
        return Uploaded(columns, SampleNoise(**self.feed(given)))

    def inputs(
        self, batch: Batch, draws: SampleNoise | None = None, *, time: float | None = None
    ) -> Inputs:
        """Inputs of the student for a batch, on the device. ``draws`` are made if not given;
        ``time`` replaces the drawn times."""
        draws = draws or self.draws(batch.positions)
        return self._inputs(self.upload(batch, draws, self.data_streams), time)

    def _inputs(self, uploaded: Uploaded, time: float | None = None) -> Inputs:
        columns, drawn = uploaded.columns["latents"], uploaded.draws
        latents = columns["mean"].float() + columns["std"].float() * drawn.posterior
        latents = normalise(latents, normalisation_of(self.manifest.autoencoder))
        if self.captions is None:
            condition = torch.where(
                drawn.drop_label, self.config.student.num_classes, columns["label"]
            )
        else:
            condition = self.captions(uploaded.columns[self.captions.stream])
        t = drawn.t
        if time is not None:
            t = torch.full_like(t, time)
        noisy, network_time, target = self.module.objective.corrupt(latents, drawn.noise, t)
        return Inputs(noisy, network_time, condition, target, self._class_token(uploaded, t))

    def _class_token(self, uploaded: Uploaded, t_B: Tensor) -> ClassToken | None:
        """Class tokens at the times of the latents, unscaled, with noise of their own (REG)."""
        if self.class_tokens is None:
            return None
        noise = uploaded.draws.class_noise
        assert noise is not None
        clean = self.class_tokens(uploaded.columns[self.class_tokens.stream])
        noisy, _, target = self.module.objective.corrupt(clean, noise, t_B)
        return ClassToken(noisy, target, clean)

    def targets_of(self, batch: Batch) -> list[Targets]:
        """Alignment targets of a batch for each stream, on the device."""
        streams = self.teacher_streams
        return self._targets_from({n: self.feed(_tensors(batch.columns[n])) for n in streams})

    def _targets_from(self, columns: Mapping[str, Mapping[str, Tensor]]) -> list[Targets]:
        return [source(columns[source.stream]) for source in self.targets]

    def close(self) -> None:
        """End the thread that draws noise."""
        self.draws.close()


def split_batch(
    batch: Batch, draws: SampleNoise, size: int | None
) -> Iterator[tuple[Batch, SampleNoise]]:
    """Split a batch and its draws into parts of at most ``size`` samples; None: one part."""
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
            draws.each(itemgetter(part)),
        )


def _tensors(columns: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    return {name: torch.from_numpy(array) for name, array in columns.items()}


def _make_optimizer(module: AlignedStudent, config: RunConfig) -> torch.optim.AdamW:
    """AdamW; projectors are in a group of their own, which the termination removes."""
    groups = [{"params": list(module.student.parameters())}]
    heads = [weight for _, projector in module.projectors() for weight in projector.parameters()]
    if heads:
        groups.append({"params": heads})
    options = config.optimizer
    return torch.optim.AdamW(
        groups,
        lr=options.learning_rate,
        betas=options.betas,
        weight_decay=options.weight_decay,
        eps=options.eps,
        # torch accepts at most one of the two and chooses by itself where both are unset
        fused=config.compute.optimizer == "fused",
        foreach=False,
    )
