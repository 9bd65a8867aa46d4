"""The trained module: a student and, until the termination, its projectors."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pipeline.alignment.fused_attention_loss import fused_attention_loss
from pipeline.alignment.losses import Targets, attention_entropy, attention_loss, feature_loss
from pipeline.alignment.resample import Grid, resample_features, resample_logits
from pipeline.diffusion.objective import make_objective
from pipeline.models import StudentOutput, Taps, make_student
from pipeline.models.projector import make_projector
from pipeline.models.taps import QueriesKeys
from schemas.alignment import AlignmentConfig, StreamAlignment
from schemas.diffusion import DiffusionConfig
from schemas.student import StudentConfig

LOSSES = ("denoising", "feature", "attention", "teacher_entropy")
"""Outputs of ``AlignedStudent``, with several teacher streams their means weighted by the streams'
weights. The last is not a loss but the lower bound of the attention loss, measured if a trigger
needs it."""
CLASS_TOKEN_LOSS = "class_token"
"""One more output, the last, of a student with a class token: its denoising loss."""

DEFAULT_DIFFUSION = DiffusionConfig()


class AlignedTeacher(NamedTuple):
    """Sizes of a teacher that shape the alignment to one of its streams."""

    width: int
    heads: int
    """Aligned heads; see ``aligned_heads``."""
    grid: Grid | None = None
    """Rows and columns of its tokens; None: the student's grid."""


class ClassToken(NamedTuple):
    """Class tokens of B samples, which are denoised with the latents (REG, arXiv 2507.01467)."""

    noisy: Tensor
    """(B, E), at the times of the latents."""
    target: Tensor
    """(B, E), the target of its denoising loss."""
    clean: Tensor
    """(B, E), the target of its alignment."""


class AlignedStream(NamedTuple):
    """One teacher stream of the alignment."""

    number: int
    options: StreamAlignment
    heads: int
    grids: tuple[Grid, Grid]
    """The student's and the teacher's."""
    fused: bool
    """If the attention loss is computed by ``fused_attention_loss``."""
    class_token: bool = False
    """If the feature loss aligns the class token too."""


def loss_names(alignment: AlignmentConfig, *, class_token: bool = False) -> tuple[str, ...]:
    """Names of the outputs of an ``AlignedStudent``: ``LOSSES``, with several teacher streams each
    stream's feature and attention loss, and ``CLASS_TOKEN_LOSS`` for a student that has one."""
    last = (CLASS_TOKEN_LOSS,) if class_token else ()
    if len(alignment.streams) < 2:
        return (*LOSSES, *last)
    single = (f"{loss}_{label}" for label in alignment.labels for loss in ("feature", "attention"))
    return (*LOSSES, *single, *last)


class AlignedStudent(nn.Module):
    """Computes the losses inside ``forward``, because DDP expects one graph that uses every
    parameter."""

    def __init__(
        self,
        student: StudentConfig,
        alignment: AlignmentConfig,
        *,
        teacher_width: int,
        heads: int,
        teacher_grid: Grid | None = None,
        others: Sequence[AlignedTeacher] = (),
        diffusion: DiffusionConfig = DEFAULT_DIFFUSION,
        measure_entropy: bool = False,
        fused: bool = True,
        class_streams: Collection[int] = (),
    ) -> None:
        """``teacher_width``, ``heads`` and ``teacher_grid``: the ``AlignedTeacher`` of the first
        stream; ``others``: those of ``alignment.others``. ``fused``: use ``fused_attention_loss``,
        which needs equal grids; ignored otherwise. ``class_streams``: numbers of the streams of the
        teacher whose class token the student denoises: their feature losses align it too, as one
        more token before the patches, as in REG; others align patches alone."""
        super().__init__()
        self.student = make_student(student)
        self.objective = make_objective(student, diffusion)
        self.alignment = alignment
        self.measure_entropy = measure_entropy
        self.losses = loss_names(alignment, class_token=student.class_token is not None)
        self.compiled = False
        self.projector: nn.Module | None = None
        """That of the first stream."""
        self.other_projectors = nn.ModuleDict()
        """Those of further streams, by the stream's number; see ``projectors``."""
        streams = []
        teachers = (AlignedTeacher(teacher_width, heads, teacher_grid), *others)
        for number, (options, teacher) in enumerate(zip(alignment.streams, teachers, strict=False)):
            grids = (student.grid, teacher.grid or student.grid)
            kernel = fused and grids[0] == grids[1]
            own = number in class_streams
            streams.append(AlignedStream(number, options, teacher.heads, grids, kernel, own))
            if options.feature_weight:
                projector = make_projector(options, student.size.width, teacher.width, grids[1])
                if number == 0:
                    self.projector = projector
                else:
                    self.other_projectors[f"{number}"] = projector
        self.streams = tuple(streams)
        self.taps = _make_taps(self.streams)

    def compile_parts(self, *, sharded: bool = False) -> None:
        """Compile each block, the final layer and the projector separately; ``sharded``: before
        they are sharded.

        Equal blocks share their code, and after the termination only the variant without taps is
        needed.
        """
        self.compiled = True
        # Assigning the flag its own value marks it as set. Otherwise sampling, which sets and
        # restores it, would leave a different state and force a recompilation of everything.
        matmul = torch.backends.cuda.matmul
        matmul.allow_tf32 = matmul.allow_tf32
        # DDP would split each block's graph at gradient bucket boundaries to overlap communication;
        # blocks are small enough to reduce their gradients after the whole block.
        torch._dynamo.config.optimize_ddp = False
        for part in self.parts:
            if sharded:  # hooks that gather weights stay outside of the graph
                part.forward = torch.compile(part.forward)
            else:
                part.compile()

    @property
    def parts(self) -> list[nn.Module]:
        """Blocks, final layer and projectors."""
        projectors = (projector for _, projector in self.projectors())
        return [*self.student.blocks, self.student.final_layer, *projectors]

    def projectors(self) -> Iterator[tuple[int, nn.Module]]:
        """Number and projector of each stream that has one."""
        if self.projector is not None:
            yield 0, self.projector
        for number, projector in self.other_projectors.items():
            yield int(number), projector

    def release_alignment(self) -> None:
        """Disable the taps and remove the projectors."""
        self.streams, self.taps = (), Taps()
        self.projector, self.other_projectors = None, nn.ModuleDict()

    def forward(
        self,
        x_BChw: Tensor,
        t_B: Tensor,
        condition: Tensor,
        target_BChw: Tensor,
        *targets: Targets,
        class_token: ClassToken | None = None,
    ) -> Tensor:
        """Sums over the batch of the quantities in ``self.losses``, (4,) or more, float32; disabled
        ones are 0.

        ``x``, ``t`` and ``target`` are the outputs of ``objective.corrupt``, ``condition`` is the
        student's third input: classes (B,) or text embeddings (B, T, E); ``targets`` are those of
        each stream, ignored after ``release_alignment``. ``class_token`` goes with a student that
        has one, in both phases.
        """
        if class_token is None:
            out = self.student(x_BChw, t_B, condition, self.taps)
        else:
            out = self.student(x_BChw, t_B, condition, self.taps, class_token.noisy)
        denoising = self.objective.loss(out.prediction, x_BChw, t_B, target_BChw).sum()
        zero = torch.zeros_like(denoising)
        assert not self.streams or len(targets) == len(self.streams)
        found = [
            self._stream_losses(stream, out, one, zero, class_token)
            for stream, one in zip(self.streams, targets, strict=False)
        ]
        last = []
        if class_token is not None:
            last = [
                self.objective.loss(
                    out.class_prediction, class_token.noisy, t_B, class_token.target
                ).sum()
            ]
        if len(found) == 1:
            return torch.stack([denoising, *found[0], *last])
        single = [loss for one in found for loss in one[:2]]
        totals = self._weighted_means(found) if found else [zero] * 3
        losses = [denoising, *totals, *single]
        blank = [zero] * (len(self.losses) - len(losses) - len(last))
        return torch.stack([*losses, *blank, *last])

    def _stream_losses(
        self,
        stream: AlignedStream,
        out: StudentOutput,
        targets: Targets,
        zero: Tensor,
        class_token: ClassToken | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Feature loss, attention loss and teacher's entropy of one stream, sums over the batch."""
        feature = attention = entropy = zero
        if stream.options.feature_weight:
            assert targets.features is not None
            features, wanted = self._features(stream, out), targets.features
            if class_token is None:
                features = resample_features(features, *stream.grids)
            else:
                patches = resample_features(features[:, 1:], *stream.grids)
                if stream.class_token:
                    wanted = torch.cat([class_token.clean.unsqueeze(1), wanted], dim=1)
                    patches = torch.cat([features[:, :1], patches], dim=1)
                features = patches
            feature = feature_loss(self._projected(stream, features), wanted).sum()
        if stream.options.attention_weight:
            assert targets.attention is not None
            attention = self._attention_losses(stream, out, targets.attention).sum()
            if self.measure_entropy:
                entropy = attention_entropy(targets.attention).sum()
        return feature, attention, entropy

    def _features(self, stream: AlignedStream, out: StudentOutput) -> Tensor:
        """The student's tokens (B, N, D) at the stream's depth."""
        depth = stream.options.feature_depth
        if depth == self.taps.feature_depth:
            assert out.features is not None
            return out.features
        return out.other_features[self.taps.other_depths.index(depth)]

    def _projected(self, stream: AlignedStream, features_BND: Tensor) -> Tensor:
        if stream.number == 0:
            assert self.projector is not None
            projector = self.projector
        else:
            projector = self.other_projectors[f"{stream.number}"]
        projected: Tensor = projector(features_BND)
        return projected

    def _attention_losses(
        self, stream: AlignedStream, out: StudentOutput, teacher_probs_BLHNN: Tensor
    ) -> Tensor:
        """Attention loss per sample: (B,)."""
        out = self._attended(stream, out)
        if stream.fused:
            return fused_attention_loss(out.attended, teacher_probs_BLHNN, compiled=self.compiled)
        logits = out.attention_logits
        assert logits is not None
        logits = resample_logits(logits, *stream.grids)
        return attention_loss(logits, teacher_probs_BLHNN)

    def _attended(self, stream: AlignedStream, out: StudentOutput) -> StudentOutput:
        """The output with the attention of the stream's layers and heads only."""
        taps, layers = self.taps, stream.options.student_layers
        if layers == taps.attention_layers and stream.heads == taps.heads:
            return out
        pairs = [out.attended[taps.attention_layers.index(layer)] for layer in layers]
        chosen = (QueriesKeys(q[:, : stream.heads], k[:, : stream.heads]) for q, k in pairs)
        return out._replace(attended=tuple(chosen))

    def _weighted_means(self, found: Sequence[tuple[Tensor, Tensor, Tensor]]) -> list[Tensor]:
        """Means of the streams' losses, weighted by their weights; 0 where all weights are."""
        features = [stream.options.feature_weight for stream in self.streams]
        attentions = [stream.options.attention_weight for stream in self.streams]
        means = []
        kinds = zip(*found, strict=True)
        for values, weights in zip(kinds, (features, attentions, attentions), strict=True):
            total = sum(weights) or 1.0
            parts = [value * (w / total) for value, w in zip(values, weights, strict=True)]
            means.append(torch.stack(parts).sum())
        return means


def _make_taps(streams: Sequence[AlignedStream]) -> Taps:
    """Taps for what all streams read."""
    depths = sorted({s.options.feature_depth for s in streams if s.options.feature_weight})
    attended = [s for s in streams if s.options.attention_weight]
    layers = sorted({layer for s in attended for layer in s.options.student_layers})
    return Taps(
        feature_depth=depths[0] if depths else None,
        attention_layers=tuple(layers),
        heads=max((s.heads for s in attended or streams), default=0),
        other_depths=tuple(depths[1:]),
    )
