"""The optimizer of a training: AdamW that clips gradients and can skip a step."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from pipeline.alignment.aligned_student import AlignedStudent
from pipeline.distributed.sharding import load_whole_optimizer, whole
from schemas.run import RunConfig


class ClippedAdamW(torch.optim.AdamW):
    """AdamW of a student and its projectors, which are in a group of their own."""

    grad_scale: Tensor
    """Divisor of the gradients, which the fused kernel reads where it is set."""
    found_inf: Tensor
    """Likewise: 1 for a step without effect, else 0, as a gradient scaler sets it."""

    def __init__(
        self, module: AlignedStudent, config: RunConfig, device: torch.device, *, sharded: bool
    ) -> None:
        """``device`` is that of the weights; ``sharded``: they are divided among workers."""
        groups = [{"params": list(module.student.parameters())}]
        heads = [
            weight for _, projector in module.projectors() for weight in projector.parameters()
        ]
        if heads:
            groups.append({"params": heads})
        options = config.optimizer
        super().__init__(
            groups,
            lr=options.learning_rate,
            betas=options.betas,
            weight_decay=options.weight_decay,
            eps=options.eps,
            # torch accepts at most one of the two and chooses by itself where both are unset
            fused=config.compute.optimizer == "fused",
            foreach=False,
        )
        self._limit = options.max_grad_norm
        self._scales = device.type == "cuda" and not sharded
        if sharded:
            load_whole_optimizer(self)

    @property
    def fused(self) -> bool:
        """If steps are one kernel; a checkpoint that is loaded brings its own choice."""
        return bool(self.param_groups[0]["fused"])

    @property
    def clips_in_update(self) -> bool:
        """If ``update`` clips, not ``clip_gradients``."""
        return self.fused and self._scales

    def clip_gradients(self, parameters: Iterable[Tensor]) -> Tensor:
        """The global norm of the gradients of all ``parameters``, summed in their order. The
        gradients are then clipped to ``max_grad_norm``.

        On a GPU the fused optimizer divides by ``grad_scale`` where it reads the gradients anyway.
        This rounds a quotient instead of a product; unclipped gradients keep every bit.
        """
        if not self.clips_in_update:
            norm = torch.nn.utils.clip_grad_norm_(parameters, self._limit)
            return whole(norm.detach())
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        # inverse of clip_grad_norm_'s factor
        self.grad_scale = ((norm + 1e-6) / self._limit).clamp(min=1.0)
        return norm

    def update(self, skipped: Tensor | None, *, capturing: bool) -> None:
        """One step, without effect where ``skipped``. ``capturing``: a CUDA graph records it."""
        if skipped is not None:
            if self.fused:
                self.found_inf = skipped.float()
            elif skipped:  # waits for the device, as the plain form has no such flag
                return
        # the fused kernel can always be captured; a flag that is left would be saved
        for group in self.param_groups:
            group["capturable"] = capturing
        self.step()
        for group in self.param_groups:
            group["capturable"] = False

    def drop_projectors(self) -> None:
        """Remove the projectors, and free their state."""
        for group in self.param_groups[1:]:
            for parameter in group["params"]:
                self.state.pop(parameter, None)
        del self.param_groups[1:]
