"""The trained module: a student and, until the termination, its projector."""

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
"""Outputs of ``AlignedStudent``. The last is not a loss but the lower bound of the attention loss,
measured if a trigger needs it."""

DEFAULT_DIFFUSION = DiffusionConfig()


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
        diffusion: DiffusionConfig = DEFAULT_DIFFUSION,
        measure_entropy: bool = False,
        fused: bool = True,
    ) -> None:
        """``teacher_grid``: rows and columns of the teacher's tokens; None: the student's grid.
        ``fused``: use ``fused_attention_loss``, which needs equal grids; ignored otherwise."""
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
        """Blocks, final layer and projector."""
        parts = [*self.student.blocks, self.student.final_layer, self.projector]
        return [part for part in parts if part is not None]

    def release_alignment(self) -> Projector | None:
        """Disable the taps and remove the projector, which is returned."""
        projector, self.projector, self.taps = self.projector, None, Taps()
        return projector

    def forward(
        self, x_BChw: Tensor, t_B: Tensor, y_B: Tensor, target_BChw: Tensor, targets: Targets
    ) -> Tensor:
        """Sums over the batch of the quantities in ``LOSSES``: (4,), float32; disabled ones are 0.

        ``x``, ``t`` and ``target`` are the outputs of ``objective.corrupt``.
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
        """Attention loss per sample: (B,)."""
        if self.fused:
            return fused_attention_loss(out.attended, teacher_probs_BLHNN, compiled=self.compiled)
        logits = out.attention_logits
        assert logits is not None
        logits = resample_logits(logits, *self.grids)
        return attention_loss(logits, teacher_probs_BLHNN)
