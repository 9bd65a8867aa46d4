"""Agreement of all workers on the step at which a run saves or stops."""

from __future__ import annotations

import torch

from pipeline.distributed.process_group import ProcessGroup
from pipeline.distributed.signals import PollRequest, StopRequest


class StopConsensus:
    """Makes all ranks serve a request at the same step boundary, on whichever rank it arrived.

    Ranks vote at every boundary and act on the vote of the boundary before: its reduction has
    finished by then, so the loop does not wait for the device. The cost is one small reduction
    per step.
    """

    def __init__(self, group: ProcessGroup, poll: PollRequest) -> None:
        self.group = group
        self.poll = poll
        self._pending: torch.Tensor | None = None
        self._counted: torch.cuda.Event | None = None

    def at_boundary(self) -> StopRequest:
        """The request to serve now. Every rank calls it before each step, and equally often within
        a validation."""
        if self.group.world_size == 1:
            return self.poll()
        request = self._last_vote()
        self._vote(self.poll())
        return request

    def forget(self) -> None:
        """Drop the pending vote, because its request has just been served."""
        self._last_vote()

    def _vote(self, request: StopRequest) -> None:
        votes = torch.zeros(len(StopRequest), device=self.group.device)
        votes[int(request)].fill_(1)
        self._pending = self.group.sum(votes)
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
        return max(request for request in StopRequest if votes[request])
