"""Effects of errors in targets: on the targets, on the losses and on their gradients."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.alignment.aligned_student import AlignedStudent
from pipeline.alignment.losses import Targets
from pipeline.teachers import Teacher
from schemas.alignment import AlignmentConfig
from schemas.student import StudentConfig

NEAR = 0.3
"""Errors of a student that has almost learnt its targets: the standard deviation of its logits'
errors, and that of its features' errors relative to the features'."""
SPREAD = 0.04  # of the noise added to a new student's weights, whose blocks are no-ops otherwise


class Judge:
    """Compares targets with exact ones on a small student of random weights."""

    def __init__(self, teacher: Teacher, layers: tuple[int, ...], exact: Targets) -> None:
        """``exact``: exact targets of all B images."""
        depth = len(layers) + 2
        rows, columns = teacher.grid
        assert rows == columns
        student = StudentConfig(
            model="SiT-S/2",
            depth=depth,
            width=16 * teacher.heads,
            heads=teacher.heads,
            latent_size=2 * rows,
            num_classes=10,
        )
        self.alignment = AlignmentConfig(
            feature_depth=depth,
            student_layers=tuple(range(1, 1 + len(layers))),
            teacher_layers=layers,
            projector_width=256,
        )
        assert exact.features is not None
        self.exact = exact
        torch.manual_seed(0)
        self.module = AlignedStudent(
            student,
            self.alignment,
            teacher_width=exact.features.shape[-1],
            heads=teacher.heads,
        )
        with torch.no_grad():
            for parameter in self.module.parameters():
                parameter += torch.randn_like(parameter) * SPREAD
        samples = len(exact.features)
        self.inputs = torch.randn(2, samples, *student.latent_shape)
        self.times = torch.rand(samples)
        self.labels = torch.randint(10, (samples,))
        self.exact_losses, self.exact_gradients = self._losses_of(exact)

    def __call__(self, targets: Targets) -> dict[str, float]:
        divergence = row_divergence(self.exact, targets)
        assert targets.features is not None
        assert self.exact.features is not None
        cosine = F.cosine_similarity(
            targets.features.double(), self.exact.features.double(), dim=-1
        )
        losses, gradients = self._losses_of(targets)
        return {
            "kl": float(divergence.mean()),
            "kl_max": float(divergence.max()),
            "feature_cosine_min": float(cosine.min()),
            "feature_cosine": float(cosine.mean()),
            "gradient_cosine": float(
                F.cosine_similarity(gradients, self.exact_gradients, dim=-1).min()
            ),
            "gradient_cosine_near": self._near(targets),
            "loss_error": float(((losses - self.exact_losses) / self.exact_losses).abs().max()),
        }

    def _losses_of(self, targets: Targets) -> tuple[Tensor, Tensor]:
        """The weighted alignment loss of each image (B,), and its gradients (B, parameters)."""
        losses, gradients = [], []
        for i in range(len(self.times)):
            one = slice(i, i + 1)
            self.module.zero_grad(set_to_none=True)
            parts = self.module(
                self.inputs[0, one],
                self.times[one],
                self.labels[one],
                self.inputs[1, one],
                Targets(*(None if target is None else target[one] for target in targets)),
            )
            weighted = (
                self.alignment.feature_weight * parts[1]
                + self.alignment.attention_weight * parts[2]
            )
            weighted.backward()
            losses.append(weighted.detach().double())
            grads = [p.grad.flatten() for p in self.module.parameters() if p.grad is not None]
            gradients.append(torch.cat(grads).double())
        return torch.stack(losses), torch.stack(gradients)

    def _near(self, targets: Targets) -> float:
        """The smaller of two cosines between exact and coded gradients over all images, at the
        logits and at the projected features of a student that is ``NEAR`` its targets."""
        rng = torch.Generator().manual_seed(1)
        exact_p, coded_p = self.exact.attention, targets.attention
        exact_f, coded_f = self.exact.features, targets.features
        assert exact_p is not None
        assert coded_p is not None
        assert exact_f is not None
        assert coded_f is not None
        sums = torch.zeros(3, dtype=torch.double)
        for exact, coded in zip(exact_p, coded_p, strict=True):
            noise = torch.randn(exact.shape, generator=rng) * NEAR
            student = torch.softmax(exact.clamp_min(1e-30).log() + noise, -1)
            sums += _products(student - exact, student - coded)
        attention = float(sums[0] / (sums[1] * sums[2]).sqrt())
        noise = torch.randn(exact_f.shape, generator=rng) * NEAR * exact_f.std()
        gradients = []
        for features in (exact_f, coded_f):
            projected = (exact_f + noise).requires_grad_()
            F.cosine_similarity(projected, features, dim=-1).sum().backward()
            assert projected.grad is not None
            gradients.append(projected.grad)
        products = _products(*gradients)
        return min(attention, float(products[0] / (products[1] * products[2]).sqrt()))


def row_divergence(exact: Targets, coded: Targets) -> Tensor:
    """KL divergence of every attention row in nats, float64 (B, L, H, N)."""
    assert exact.attention is not None
    assert coded.attention is not None
    floor = torch.finfo(torch.float32).tiny
    rows = []
    for p, q in zip(
        exact.attention, coded.attention, strict=True
    ):  # one image at a time saves memory
        p, q = (x.double().clamp_min(floor) for x in (p, q))
        p, q = p / p.sum(-1, keepdim=True), q / q.sum(-1, keepdim=True)
        rows.append((p * (p / q).log()).sum(-1))
    return torch.stack(rows)


def _products(a: Tensor, b: Tensor) -> Tensor:
    """Dot products a.b, a.a and b.b, float64 (3,)."""
    a, b = a.flatten().double(), b.flatten().double()
    return torch.stack([a @ b, a @ a, b @ b])
