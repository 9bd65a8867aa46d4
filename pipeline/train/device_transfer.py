"""What a step needs on the device, brought there while the steps before it compute."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor


class DevicePrefetcher:
    """Copies to the device, from pinned memory and on a stream of their own.

    Python runs ahead of a GPU: it asks for a batch's copies while the step before still computes.
    On the stream of the computation they would wait for that step, and from pageable memory Python
    would too.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._under_way: deque[tuple[torch.cuda.Event, list[Tensor]]] = deque()

    def allocate(self, nbytes: int) -> np.ndarray:
        """Memory to read a batch into, uint8 (nbytes,), from which copies need none between: for a
        GPU pinned memory, which torch keeps for the next batch, and rounds up to a power of two.
        Raises ``MemoryError``."""
        if self._stream is None:
            return np.empty(nbytes, np.uint8)
        try:
            return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True).numpy()
        except RuntimeError as error:
            raise MemoryError(f"{nbytes} bytes of pinned memory ({error})") from None

    def release(self) -> None:
        """Give back the memory of batches that will not come again, as where a stream is closed."""
        if self._stream is not None and hasattr(torch.accelerator, "empty_host_cache"):
            self._stream.synchronize()
            self._under_way.clear()
            torch.accelerator.empty_host_cache()

    def __call__(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The same on the device; what is computed next waits for them."""
        if self._stream is None:
            return {name: tensor.to(self.device) for name, tensor in tensors.items()}
        computation = torch.cuda.current_stream(self.device)
        pinned = {name: tensor.contiguous().pin_memory() for name, tensor in tensors.items()}
        with torch.cuda.stream(self._stream):
            copies = {
                name: tensor.to(self.device, non_blocking=True) for name, tensor in pinned.items()
            }
            done = self._stream.record_event()
        # Torch sees to it that pinned memory is not used again before it is copied, but not where a
        # copy by way of numpy begins in its middle, as those of micro-batches do.
        self._under_way.append((done, list(pinned.values())))
        while self._under_way and self._under_way[0][0].query():
            self._under_way.popleft()
        computation.wait_stream(self._stream)
        for copy in copies.values():  # else its memory may be another copy's while it is read
            copy.record_stream(computation)
        return copies
