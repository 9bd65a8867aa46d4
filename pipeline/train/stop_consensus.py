"""Asking a run to save or to stop, and all its workers agreeing on the step at which they do."""

from __future__ import annotations

import torch

from pipeline.distributed.process_group import ProcessGroup
from pipeline.distributed.signals import PollRequest, StopRequest


class StopConsensus:
    """What all ranks do at a step boundary, whichever of them was asked.

    They vote at every boundary and act on the vote of the one before: by then it has been counted,
    so that no device is waited for. One tiny reduction per step is what that costs.
    """

    def __init__(self, parallel: ProcessGroup, ask: PollRequest) -> None:
        self.parallel = parallel
        self.ask = ask
        self._pending: torch.Tensor | None = None
        self._counted: torch.cuda.Event | None = None

    def at_boundary(self) -> StopRequest:
        """Every rank calls it before each step, and equally often between two steps."""
        if self.parallel.world_size == 1:
            return self.ask()
        wish = self._last_vote()
        self._vote(self.ask())
        return wish

    def forget(self) -> None:
        """Drop the vote that is under way: what it wished for has just been done."""
        self._last_vote()

    def _vote(self, wish: StopRequest) -> None:
        votes = torch.zeros(len(StopRequest), device=self.parallel.device)
        votes[int(wish)].fill_(1)
        self._pending = self.parallel.sum(votes)
        if votes.is_cuda:
            host = torch.empty(len(StopRequest), pin_memory=True)
            self._pending = host.copy_(votes, non_blocking=True)
            self._counted = torch.cuda.Event()
            self._counted.record()

    def _last_vote(self) -> StopRequest:
        if self._pending is None:
            return StopRequest.GO_ON
        if self._counted is not None:
            self._counted.synchronize()
        votes, self._pending, self._counted = self._pending.tolist(), None, None
        return max(wish for wish in StopRequest if votes[wish])
