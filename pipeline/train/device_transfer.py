"""Copies of batches to the device that overlap with computation."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor


class DevicePrefetcher:
    """Copies to the device, from pinned memory and on a stream of their own.

    Python runs ahead of a GPU and requests the copies of a batch while the previous step computes.
    On the computation's stream they would wait for that step; from pageable memory Python would
    wait for them.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._pending: deque[tuple[torch.cuda.Event, list[Tensor]]] = deque()

    def allocate(self, nbytes: int) -> np.ndarray:
        """Host memory for a batch, uint8 (nbytes,): pinned for a GPU, so that copies are direct.
        Torch reuses pinned blocks and rounds them up to powers of two. Raises ``MemoryError``."""
        if self._stream is None:
            return np.empty(nbytes, np.uint8)
        try:
            return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True).numpy()
        except RuntimeError as error:
            raise MemoryError(f"{nbytes} bytes of pinned memory ({error})") from None

    def release(self) -> None:
        """Free pinned memory that is not in use, for example after a stream was closed."""
        if self._stream is not None and hasattr(torch.accelerator, "empty_host_cache"):
            self._stream.synchronize()
            self._pending.clear()
            torch.accelerator.empty_host_cache()

    def __call__(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies on the device; the computation that follows waits for them."""
        if self._stream is None:
            return {name: tensor.to(self.device) for name, tensor in tensors.items()}
        computation = torch.cuda.current_stream(self.device)
        pinned = {name: tensor.contiguous().pin_memory() for name, tensor in tensors.items()}
        with torch.cuda.stream(self._stream):
            copies = {
                name: tensor.to(self.device, non_blocking=True) for name, tensor in pinned.items()
            }
            done = self._stream.record_event()
        # Torch does not reuse a pinned block before it is copied, except where a copy begins in the
        # middle of the block, as those of micro-batches do: hold these until their copy is done.
        self._pending.append((done, list(pinned.values())))
        while self._pending and self._pending[0][0].query():
            self._pending.popleft()
        computation.wait_stream(self._stream)
        for copy in copies.values():  # else its memory may be reused while it is read
            copy.record_stream(computation)
        return copies
