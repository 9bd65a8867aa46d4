"""Checkpoints that a thread writes while the training goes on, from a copy in host memory."""

from __future__ import annotations

import copy
import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from pipeline.checkpoints.state import CheckpointContents
from schemas.errors import plain_text

logger = logging.getLogger(__name__)

PIECE = 1 << 28
"""Bytes of a block of host memory. Pinned blocks are powers of two; one would waste up to half."""
ALIGNMENT = 64


class BackgroundCheckpoints:
    """Writes one checkpoint at a time; a context manager, which waits for the last one at its end.

    ``save`` copies the state and returns. An error of the thread is raised, as it is, by the next
    call of ``check``, ``wait`` or ``save``, so no later than at the next checkpoint.
    """

    def __init__(
        self,
        save: Callable[[int, CheckpointContents], None],
        device: torch.device,
        *,
        enabled: bool = True,
    ) -> None:
        """``save`` writes and publishes; not ``enabled``, it is called without a thread. ``device``
        has the weights."""
        self._save = save
        self._memory = HostMemory(device)
        self._enabled = enabled
        self._writing: tuple[Future[None], threading.Thread] | None = None

    def __enter__(self) -> BackgroundCheckpoints:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self.wait()
        elif isinstance(error, Exception):  # Ctrl-C for the second time waits for nothing
            try:
                self.wait()
            except Exception as own:
                logger.error("%s", own)  # ``error`` is raised

    def save(
        self, step: int, contents: CheckpointContents, *, behind: bool = True
    ) -> torch.cuda.Event | None:
        """Start to write the present state, after the checkpoint before. Returns, on a GPU, the
        event until which tensors of ``contents`` must not be changed; elsewhere they are copied.
        Not ``behind``, this worker writes nothing: nothing is copied, no thread is started."""
        self.wait()
        held = self._memory.copy(contents) if self._enabled and behind else None
        if held is None:
            self._save(step, contents)
            return None
        copied, event = held
        written: Future[None] = Future()

        def write() -> None:
            try:
                if event is not None:
                    event.synchronize()
                self._save(step, copied)
            except BaseException as error:
                written.set_exception(error)
            else:
                written.set_result(None)

        thread = threading.Thread(target=write, name=f"checkpoint-{step}", daemon=True)
        thread.start()
        self._writing = written, thread
        return event

    def check(self) -> None:
        """Raise the error of a write that has failed. Waits for none that goes on."""
        if self._writing is not None and self._writing[0].done():
            self.wait()

    def wait(self) -> None:
        """Wait until nothing is being written. Raises the error of the write."""
        if self._writing is not None:
            written, thread = self._writing
            try:
                written.result()
            finally:
                if written.done():
                    self._writing = None
                    # its last act is to free tensors, which aborts a process that is ending
                    thread.join()


class HostMemory:
    """Memory for one copy of a run's state, kept from one checkpoint to the next: the bytes of the
    state, and a block that is not full. Pinned for a GPU, so that copies are direct."""

    def __init__(self, device: torch.device) -> None:
        self._blocks: list[Tensor] = []
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._device = device
        self._missing = False

    def copy(
        self, contents: CheckpointContents
    ) -> tuple[CheckpointContents, torch.cuda.Event | None] | None:
        """A copy, which replaces the one before, and on a GPU the event of its completion. None,
        with a warning, if there is not enough memory."""
        tensors = {
            id(tensor): tensor for tensor in _tensors((contents.weights, contents.optimizer))
        }
        try:
            places = self._allocate(tensors)
        except (RuntimeError, MemoryError) as error:
            self._blocks.clear()
            if not self._missing:
                logger.warning(
                    "no memory for a copy of the state, so that the training waits for each "
                    "checkpoint: %s",
                    plain_text(str(error)) or type(error).__name__,
                )
            self._missing = True
            return None
        event = self._fill(places, tensors)
        # plain values: some of them are changed by the next step
        memo: dict[int, Any] = dict(places)
        weights, optimizer = copy.deepcopy((dict(contents.weights), contents.optimizer), memo)
        state = copy.deepcopy(dict(contents.state))
        return CheckpointContents(weights, optimizer, state, contents.share), event

    @property
    def nbytes(self) -> int:
        """Bytes of memory that are held."""
        return sum(block.nbytes for block in self._blocks)

    def _allocate(self, tensors: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """A place for each tensor, with a storage of its own, because ``torch.save`` writes whole
        storages. Blocks of the copy before are used again, in their order."""
        total = sum(_padded(tensor.nbytes) for tensor in tensors.values())
        size = min(PIECE, 1 << max(12, (total - 1).bit_length()))
        old, self._blocks = self._blocks, []
        places, begin = {}, 0
        for key, tensor in tensors.items():
            needed = _padded(tensor.nbytes)
            if not self._blocks or begin + needed > self._blocks[-1].nbytes:
                wanted = max(size, 1 << (needed - 1).bit_length())
                fits = old and old[0].nbytes == wanted
                self._blocks.append(old.pop(0) if fits else self._block(wanted))
                begin = 0
            part = self._blocks[-1].numpy()[begin : begin + tensor.nbytes]
            strides = torch.empty_like(tensor, device="meta").stride()
            flat = torch.from_numpy(part).view(tensor.dtype)
            places[key] = flat.as_strided(tensor.shape, strides)
            begin += needed
        return places

    def _block(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=self._stream is not None)

    @torch.no_grad()
    def _fill(
        self, places: Mapping[int, Tensor], tensors: Mapping[int, Tensor]
    ) -> torch.cuda.Event | None:
        if self._stream is None:
            for key, place in places.items():
                place.copy_(tensors[key])
            return None
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            for key, place in places.items():
                place.copy_(tensors[key], non_blocking=True)
                if tensors[key].is_cuda:  # else its memory may be reused while it is read
                    tensors[key].record_stream(self._stream)
            return self._stream.record_event()


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for one in value.values():
            yield from _tensors(one)
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _tensors(one)


def _padded(nbytes: int) -> int:
    return -(-max(1, nbytes) // ALIGNMENT) * ALIGNMENT
