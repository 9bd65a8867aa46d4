"""Teacher and autoencoder on one device: images of a shard in, a committed shard out."""

from __future__ import annotations

import importlib.metadata
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.datasets import ImageItem, open_reader
from pipeline.datasets.crop import BadImageError, decode_crop
from pipeline.datasets.reader import UNREADABLE
from pipeline.extract.latent_sources import LatentSource, open_latents
from pipeline.extract.tasks import Description, ShardTask, stream_name
from pipeline.precision import choose_precision
from pipeline.store import ShardWriter
from pipeline.targets.cuts import NotFiniteError, cut_values, encode_values
from pipeline.targets.tail import first_tail_block, save_tail
from pipeline.teachers import Teacher
from schemas.errors import UserError
from schemas.extract import ExtractConfig, Precision
from schemas.store import ComputeInfo, Manifest, SkippedImage, WeightsFile

VERSIONED = ("torch", "timm", "diffusers", "numpy", "numcodecs", "pillow")
BATCHES_AHEAD = 2  # decoded while the networks work on the one before
BATCHES_BEHIND = 2  # computed, and waiting to be compressed and written


Arrays = dict[str, dict[str, np.ndarray]]
"""stream -> stored array -> (B, ...)"""


@dataclass(frozen=True)
class ShardResult:
    """What became of a shard."""

    shard: int
    samples: int
    bad_images: tuple[SkippedImage, ...]
    committed: bool


class Encoder:
    """Encodes shards of one extraction. Plain Python: the Ray actor only wraps it."""

    def __init__(self, config: ExtractConfig, *, device: str, threads: int) -> None:
        torch.set_num_threads(threads)  # thread counts decide the last bits of CPU arithmetic
        torch.backends.cudnn.benchmark = False  # as autotuned kernels would
        self.config = config
        self.device = torch.device(device)
        self.copies = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self.precision: Precision = choose_precision(config, device)
        self.threads = threads
        self.teacher = Teacher(config.teacher, resolution=config.resolution, layers=config.layers)
        self.teacher.to(self.device)
        self.latents: LatentSource | None = None
        if config.add_stream is None:  # otherwise the latents are there already
            self.latents = open_latents(config, self.device)
        self.read = open_reader(config)

    def describe(self) -> Description:
        """Also a first forward pass of the autoencoder, so that what cannot work fails here."""
        versions = {name: importlib.metadata.version(name) for name in VERSIONED}
        versions["torch"] = torch.__version__  # with the build: CUDA versions differ in last bits
        if self.config.format == "zarr":
            versions["zarr"] = importlib.metadata.version("zarr")
        return Description(
            teacher=self.teacher.info(),
            autoencoder=None if self.latents is None else self.latents.info(self.config.resolution),
            compute=ComputeInfo(
                device="cuda" if self.device.type == "cuda" else "cpu",
                precision=self.precision,
                batch_size=self.config.batch_size,
                threads=self.threads if self.device.type == "cpu" else 0,
                versions=versions,
            ),
        )

    def save_tail(self, url: str) -> WeightsFile | None:
        """Put the weights that training will need into the store, where the cut leaves any."""
        first = first_tail_block(self.config.cut, self.config.layers)
        if first is None:
            return None
        return save_tail(self.teacher, url, stream_name(self.config), first)

    def encode_shard(self, url: str, manifest: Manifest, task: ShardTask) -> ShardResult:
        """Write and commit one shard; with bad images and ``on_bad_image: stop``, commit nothing.

        Raises ``UserError`` where a number cannot be stored, ``OSError`` where storage fails.
        """
        bad: list[SkippedImage] = []
        with (
            ShardWriter(url, manifest, task.shard, added=self.config.add_stream) as writer,
            BackgroundWriter(BATCHES_BEHIND) as behind,
        ):
            for items, images, moments in self._decoded_batches(task, bad):
                if bad and self.config.on_bad_image == "stop":
                    continue  # only to find the others
                try:
                    arrays = self._copy_to_host(self._encode(manifest, images, moments))
                except NotFiniteError as error:
                    item = items[error.rows[0]]
                    raise UserError(
                        f"shard {task.shard}, sample '{item.key}' ({item.path}): the teacher's "
                        f"{error}; try --precision float32, or check its weights"
                    ) from None
                behind.submit(_write, writer, items, arrays)
            behind.finish()
            if bad and self.config.on_bad_image == "stop":
                return ShardResult(task.shard, 0, tuple(bad), committed=False)
            record = writer.commit(skipped=bad)
        return ShardResult(task.shard, record.samples, tuple(bad), committed=True)

    @torch.inference_mode()
    def _encode(
        self, manifest: Manifest, images: np.ndarray, moments: list[np.ndarray]
    ) -> dict[str, dict[str, Tensor]]:
        """uint8 (B, R, R, 3), and what was read of their latents, to what is stored of them."""
        pixels = torch.from_numpy(images).to(self.device).permute(0, 3, 1, 2)
        name = stream_name(self.config)
        arrays = {}
        if self.latents is not None:  # first, as what follows waits until the teacher is done
            mean, std = self.latents.latents(moments, pixels)
            arrays["latents"] = {"mean": mean, "std": std}
        dtype = getattr(torch, self.precision)
        with torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32):
            values = cut_values(self.config.cut, self.teacher, pixels)
        arrays[name] = encode_values(manifest.streams[name].columns, values)
        return arrays

    def _copy_to_host(self, tensors: dict[str, dict[str, Tensor]]) -> Callable[[], Arrays]:
        """What waits for copies from the device, which are under way while the networks compute the
        next batch."""
        copied = None
        if self.copies is not None:
            self.copies.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(self.copies):
                tensors = {
                    stream: {part: _pinned_copy(tensor) for part, tensor in parts.items()}
                    for stream, parts in tensors.items()
                }
                copied = self.copies.record_event()

        def wait() -> Arrays:
            if copied is not None:
                copied.synchronize()
            return {
                stream: {part: tensor.numpy() for part, tensor in parts.items()}
                for stream, parts in tensors.items()
            }

        return wait

    def _decoded_batches(
        self, task: ShardTask, bad: list[SkippedImage]
    ) -> Iterator[tuple[list[ImageItem], np.ndarray, list[np.ndarray]]]:
        """Batches cut by position in the shard, less the bad images, which ``bad`` collects."""
        size = self.config.batch_size
        waiting: deque[list[tuple[ImageItem, Future[tuple[np.ndarray, np.ndarray]]]]] = deque()
        starts = iter(range(0, len(task.items), size))
        with ThreadPoolExecutor(self.threads, thread_name_prefix="decode") as pool:
            while True:
                while len(waiting) <= BATCHES_AHEAD and (start := next(starts, None)) is not None:
                    batch = task.items[start : start + size]
                    waiting.append([(item, pool.submit(self._decode, item)) for item in batch])
                if not waiting:
                    return
                items, images, stored = [], [], []
                for item, future in waiting.popleft():
                    try:
                        image, latent = future.result()
                        items.append(item)
                        images.append(image)
                        stored.append(latent)
                    except BadImageError as error:
                        bad.append(SkippedImage(key=item.key, path=item.path, error=str(error)))
                if items:
                    yield items, np.stack(images), stored

    def _decode(self, item: ImageItem) -> tuple[np.ndarray, np.ndarray]:
        """The crop, and what is read of its latent."""
        try:
            data = self.read(item)
        except UNREADABLE as error:
            raise BadImageError(error.strerror or type(error).__name__) from None
        crop = decode_crop(data, self.config.resolution, cropped=item.latent is not None)
        return crop, np.empty(0) if self.latents is None else self.latents.read(item)


def _pinned_copy(tensor: Tensor) -> Tensor:
    """On the CPU, once the device's current stream has got to it."""
    tensor.record_stream(torch.cuda.current_stream(tensor.device))  # it may be another's
    memory = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return memory.copy_(tensor, non_blocking=True)


def _write(writer: ShardWriter, items: list[ImageItem], wait: Callable[[], Arrays]) -> None:
    """Raises ``UserError`` where a number cannot be stored."""
    arrays = wait()
    for row, item in enumerate(items):
        sample: dict[str, dict[str, np.ndarray | int]] = {
            stream: {part: values[row] for part, values in parts.items()}
            for stream, parts in arrays.items()
        }
        if "latents" in sample:
            sample["latents"]["label"] = item.label
        try:
            writer.add(item.key, sample)
        except ValueError as error:
            raise UserError(f"shard {writer.shard}: {error}") from None


class BackgroundWriter:
    """A thread that does calls in the order in which they come, ``limit`` of them waiting at most.

    A context; leaving it waits for the call under way and forgets those behind it.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._waiting: deque[Future[Any]] = deque()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="behind")

    def __enter__(self) -> BackgroundWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def submit(self, call: Callable[..., Any], *arguments: Any) -> None:
        """Waits while too many are waiting. Raises what an earlier call raised."""
        while len(self._waiting) >= self._limit or (self._waiting and self._waiting[0].done()):
            self._waiting.popleft().result()
        self._waiting.append(self._pool.submit(call, *arguments))

    def finish(self) -> None:
        """Wait for all. Raises what one of them raised."""
        while self._waiting:
            self._waiting.popleft().result()
