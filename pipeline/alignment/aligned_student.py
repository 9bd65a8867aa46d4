"""The module that is trained: a student, and a projector for as long as it is aligned."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pipeline.alignment.fused_attention_loss import fused_attention_loss
from pipeline.alignment.losses import Targets, attention_entropy, attention_loss, feature_loss
from pipeline.alignment.resample import Grid, resample_features, resample_logits
from pipeline.diffusion.objective import make_objective
from pipeline.models import StudentOutput, Taps, make_student
from pipeline.models.projector import Projector
from schemas.alignment import AlignmentConfig
from schemas.diffusion import DiffusionConfig
from schemas.student import StudentConfig

LOSSES = ("denoising", "feature", "attention", "teacher_entropy")
"""What ``AlignedStudent`` returns; the last is no loss but the least that the attention loss can
reach, measured where a trigger asks for it."""

DEFAULT_DIFFUSION = DiffusionConfig()


class AlignedStudent(nn.Module):
    """Computes the losses inside ``forward``, so that DDP sees one graph that uses every
    parameter it holds."""

    def __init__(
        self,
        student: StudentConfig,
        alignment: AlignmentConfig,
        *,
        teacher_width: int,
        heads: int,
        teacher_grid: Grid | None = None,
        diffusion: DiffusionConfig = DEFAULT_DIFFUSION,
        measure_entropy: bool = False,
        fused: bool = True,
    ) -> None:
        """``teacher_grid``: rows and columns of the teacher's tokens, where not the student's.
        ``fused``: without keeping attention maps, where the grids are the same."""
        super().__init__()
        self.student = make_student(student)
        self.objective = make_objective(student, diffusion)
        self.alignment = alignment
        self.measure_entropy = measure_entropy
        self.grids = (student.grid, teacher_grid or student.grid)
        self.fused = fused and self.grids[0] == self.grids[1]
        self.compiled = False
        self.projector: Projector | None = None
        self.taps = Taps()
        if alignment.feature_weight:
            self.projector = Projector(student.size.width, alignment.projector_width, teacher_width)
        if alignment.active:
            self.taps = Taps(
                feature_depth=alignment.feature_depth if alignment.feature_weight else None,
                attention_layers=alignment.student_layers if alignment.attention_weight else (),
                heads=heads,
            )

    def compile_parts(self) -> None:
        """Compile what takes the time, each block by itself: equal blocks share their code, and the
        termination only switches to that of blocks without taps."""
        self.compiled = True
        # Said again, what is only a default counts as set. Else sampling, which sets this flag and
        # puts it back, would leave it another than it was, and all would be compiled anew.
        matmul = torch.backends.cuda.matmul
        matmul.allow_tf32 = matmul.allow_tf32
        # DDP would have every block cut where one of its buckets of gradients ends, to average them
        # before the block is done; blocks are small enough for that to wait until then.
        torch._dynamo.config.optimize_ddp = False
        for part in (*self.student.blocks, self.student.final_layer, self.projector):
            if part is not None:
                part.compile()

    def release_alignment(self) -> Projector | None:
        """Taps off; gives up the projector."""
        projector, self.projector, self.taps = self.projector, None, Taps()
        return projector

    def forward(
        self, x_BChw: Tensor, t_B: Tensor, y_B: Tensor, target_BChw: Tensor, targets: Targets
    ) -> Tensor:
        """Sums over the batch of what ``LOSSES`` names: (4,), float32, 0 where one is off.

        ``x``, ``t`` and ``target`` are what ``objective.corrupt`` gives.
        """
        out = self.student(x_BChw, t_B, y_B, self.taps)
        denoising = self.objective.loss(out.prediction, x_BChw, t_B, target_BChw).sum()
        feature = attention = entropy = torch.zeros_like(denoising)
        if self.projector is not None:
            assert targets.features is not None
            features = resample_features(out.features, *self.grids)
            feature = feature_loss(self.projector(features), targets.features).sum()
        if self.taps.attention_layers:
            assert targets.attention is not None
            attention = self._attention_losses(out, targets.attention).sum()
            if self.measure_entropy:
                entropy = attention_entropy(targets.attention).sum()
        return torch.stack([denoising, feature, attention, entropy])

    def _attention_losses(self, out: StudentOutput, teacher_probs_BLHNN: Tensor) -> Tensor:
        """(B,)"""
        if self.fused:
            return fused_attention_loss(out.attended, teacher_probs_BLHNN, compiled=self.compiled)
        logits = out.attention_logits
        assert logits is not None
        logits = resample_logits(logits, *self.grids)
        return attention_loss(logits, teacher_probs_BLHNN)
