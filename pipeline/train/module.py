"""The module that is trained: a student, and a projector for as long as it is aligned."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pipeline.alignment.losses import attention_loss, feature_loss
from pipeline.alignment.projector import Projector
from pipeline.alignment.targets import Targets
from pipeline.diffusion.interpolant import denoising_loss
from pipeline.models import SiT, Taps
from schemas.alignment import AlignmentConfig
from schemas.student import StudentConfig

LOSSES = ("denoising", "feature", "attention")


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
    ) -> None:
        super().__init__()
        self.student = SiT(student)
        self.alignment = alignment
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

    def release_alignment(self) -> Projector | None:
        """Taps off; gives up the projector."""
        projector, self.projector, self.taps = self.projector, None, Taps()
        return projector

    def forward(
        self, x_BChw: Tensor, t_B: Tensor, y_B: Tensor, velocity_BChw: Tensor, targets: Targets
    ) -> Tensor:
        """Sums over the batch of the losses in ``LOSSES``: (3,), float32, 0 where one is off."""
        out = self.student(x_BChw, t_B, y_B, self.taps)
        losses = [denoising_loss(out.velocity, velocity_BChw).sum()]
        off = torch.zeros_like(losses[0])
        if self.projector is not None:
            assert targets.features is not None
            losses.append(feature_loss(self.projector(out.features), targets.features).sum())
        else:
            losses.append(off)
        if self.taps.attention_layers:
            assert targets.attention is not None
            losses.append(attention_loss(out.attention_logits, targets.attention).sum())
        else:
            losses.append(off)
        return torch.stack(losses)
