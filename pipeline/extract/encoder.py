"""Encode a shard with teacher and autoencoder on one device: images in, a committed shard out."""

from __future__ import annotations

import importlib.metadata
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.datasets import ImageItem, open_reader
from pipeline.datasets.crop import BadImageError, decode_crop
from pipeline.datasets.reader import UNREADABLE
from pipeline.extract.calibration import Subject, calibrate, first_block
from pipeline.extract.caption_sources import (
    CaptionSource,
    describe_captions,
    open_captions,
    text_arrays,
)
from pipeline.extract.captions import text_stream_name
from pipeline.extract.latent_sources import LatentSource, open_latents
from pipeline.extract.tasks import (
    Description,
    ShardTask,
    TextDescription,
    class_name,
    cut_columns_of,
    extracted_class_stream,
    stream_name,
)
from pipeline.precision import choose_precision
from pipeline.store import ShardWriter
from pipeline.targets.cuts import (
    NotFiniteError,
    check_finite,
    class_values,
    cut_values,
    encode_unchecked,
    not_finite,
)
from pipeline.targets.tail import describe_tail, first_tail_block, save_tail
from pipeline.teachers import Teacher
from pipeline.train.device_transfer import DevicePrefetcher
from schemas.calibration import Calibration
from schemas.codecs import PROMISES
from schemas.errors import UserError
from schemas.extract import ExtractConfig, Precision
from schemas.networks import WeightsFile
from schemas.store import Manifest, SkippedImage
from schemas.streams import ClassToken, ComputeInfo

VERSIONED = ("torch", "timm", "diffusers", "numpy", "numcodecs", "pillow")
BATCHES_AHEAD = 2  # decoded while the networks compute an earlier batch
MAX_QUEUED_BATCHES = 2  # computed, not yet compressed and written
NOT_FINITE = "(not finite)"
"""Key, not the name of a stream, of the results of ``not_finite`` in ``Arrays``: they travel with
the copies back, because Python would wait for the device to judge them there."""

Decoded = tuple[np.ndarray, np.ndarray, Sequence[np.ndarray]]
"""Crop, stored latent and stored embeddings of captions of one image."""
Arrays = dict[str, dict[str, np.ndarray]]
"""stream -> stored array -> (B, ...)"""


@dataclass(frozen=True)
class ShardResult:
    """Outcome of encoding one shard."""

    shard: int
    samples: int
    bad_images: tuple[SkippedImage, ...]
    committed: bool


class Encoder:
    """Encodes shards of one extraction, without Ray: the actor only wraps it."""

    def __init__(self, config: ExtractConfig, *, device: str, threads: int) -> None:
        torch.set_num_threads(threads)  # the thread count affects the last bits of CPU results
        torch.backends.cudnn.benchmark = False  # autotuned kernels affect them, too
        self.config = config
        self.device = torch.device(device)
        self.feed = DevicePrefetcher(self.device)
        self.copies = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self.precision: Precision = choose_precision(config.precision, device)
        self.threads = threads
        self.teacher = Teacher(config.teacher, resolution=config.resolution, layers=config.layers)
        self.teacher.to(self.device)
        self.latents: LatentSource | None = None
        if config.add_stream is None:  # otherwise the store has latents already
            self.latents = open_latents(config, self.device)
        self.captions: CaptionSource | None = open_captions(config, self.device)
        self.read = open_reader(config)

    def describe(self) -> Description:
        """Models and arithmetic of this encoder. Runs a first forward pass of the autoencoder, so
        that an unusable one is reported before any shard. Raises ``UserError``."""
        return Description(
            teacher=self.teacher.info(),
            autoencoder=None if self.latents is None else self.latents.info(self.config.resolution),
            compute=describe_compute(
                self.config, self.device, self.precision, self.threads, VERSIONED
            ),
            class_token=self._class_token,
            **describe_text(self.config, self.device, self.threads, self.captions),
        )

    @property
    def _class_token(self) -> ClassToken | None:
        wanted = self.config.class_token
        if wanted == "none" or (wanted == "class" and not self.teacher.has_class_token):
            return None
        return wanted

    def describe_tail(self) -> WeightsFile | None:
        """The file of the blocks after the cut, which training needs; None if there are none."""
        first = first_tail_block(self.config.cut, self.config.layers)
        return None if first is None else describe_tail(self.teacher, self._stream, first)

    def save_tail(self, url: str) -> WeightsFile | None:
        """Write that file to the store, whose manifest names it."""
        first = first_tail_block(self.config.cut, self.config.layers)
        return None if first is None else save_tail(self.teacher, url, self._stream, first)

    def null_caption(self) -> bytes | None:
        """The bytes of the null caption's file; None without captions."""
        return None if self.captions is None else self.captions.null

    @torch.no_grad()
    def calibrate(
        self,
        items: Sequence[ImageItem],
        images: int,
        latent_shape: tuple[int, int, int],
        progress: Callable[[int], None] = lambda done: None,
    ) -> Calibration:
        """The steps of the codecs that keep the promise on the first ``images`` of ``items`` that
        can be read. ``progress`` is called after each batch with the images of all passes until
        then. Raises ``UserError``."""
        config, teacher = self.config, self.teacher
        promise, codec = config.codec.promise, config.codec.name
        assert promise is not None
        assert codec in PROMISES
        first = first_block(teacher)
        keys: list[str] = []
        measured = 0

        def advance(count: int) -> None:
            nonlocal measured
            measured += count
            progress(measured)

        tokens: dict[Precision, list[Tensor]] = {self.precision: [], "float32": []}
        for some, crops in self._crops(items, images):
            keys += [item.key for item in some]
            pixels = torch.from_numpy(crops).to(self.device).permute(0, 3, 1, 2)
            for precision, parts in tokens.items():
                dtype = getattr(torch, precision)
                with torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32):
                    entering = teacher.embed(teacher.preprocess(pixels))
                    entering, _ = teacher.run_blocks(entering, 0, first)
                parts.append(entering.cpu())
            advance(len(some))
        own, exact = tokens.pop(self.precision), tokens.get("float32")
        subject = Subject(
            cut=config.cut,
            teacher=teacher,
            columns=cut_columns_of(
                config, teacher.info(), with_class_stream=self._class_token is not None
            ),
            keys=tuple(keys),
            tokens=torch.cat(own),
            exact_tokens=None if exact is None else torch.cat(exact),
            precision=self.precision,
            device=self.device,
            progress=advance,
        )
        return calibrate(
            subject,
            codec,
            promise,
            latent_shape,
            fixed=frozenset(config.column_codecs),
            images=images,
            seed=config.codec.seed,
        )

    def _crops(
        self, items: Sequence[ImageItem], images: int
    ) -> Iterator[tuple[list[ImageItem], np.ndarray]]:
        """Batches of items and crops, uint8 (B, R, R, 3), of the first ``images`` that can be
        read. Raises ``UserError`` if none can."""
        rest, found, error = deque(items), 0, None
        with ThreadPoolExecutor(self.threads, thread_name_prefix="decode") as pool:
            while rest and found < images:
                size = min(self.config.batch_size, images - found, len(rest))
                batch = [rest.popleft() for _ in range(size)]
                good, crops = [], []
                for item, future in [(item, pool.submit(self._crop, item)) for item in batch]:
                    try:
                        crops.append(future.result())
                        good.append(item)
                    except BadImageError as bad:  # the extraction reports all of them
                        error = error or f"{item.path} ({bad})"
                found += len(good)
                if good:
                    yield good, np.stack(crops)
        if not found:
            raise UserError(
                f"--codec {self.config.codec.name}: none of {len(items)} images, on which its "
                f"steps are chosen, can be read; first {error}"
            )

    @property
    def _stream(self) -> str:
        return stream_name(self.config)

    def encode_shard(
        self,
        url: str,
        manifest: Manifest,
        task: ShardTask,
        progress: Callable[[int], None] = lambda done: None,
    ) -> ShardResult:
        """Write one shard and commit it, except with bad images and ``on_bad_image: stop``.
        ``progress`` is called after each batch with the images of the shard that are done.

        Raises ``UserError`` if a value cannot be stored, ``OSError`` if storage fails.
        """
        bad: list[SkippedImage] = []
        encoded = 0
        with ExitStack() as stack:
            writers = [
                stack.enter_context(ShardWriter(url, manifest, task.shard, added=added))
                for added in self._added(manifest)
            ]
            background = stack.enter_context(BackgroundWriter(MAX_QUEUED_BATCHES))
            for items, images, moments, contexts in self._decoded_batches(task, bad):
                if bad and self.config.on_bad_image == "stop":
                    continue  # decode the other batches only to list their bad images
                tensors = self._encode(manifest, images, moments)
                if self.captions is not None:
                    name = text_stream_name(self.config)
                    stream = manifest.text_streams[name]
                    tensors[name] = text_arrays(self.captions, stream, items, contexts)
                arrays = self._copy_to_host(tensors)
                background.submit(_write, writers, items, arrays)
                encoded += len(items)
                progress(encoded + len(bad))
            background.finish()
            if bad and self.config.on_bad_image == "stop":
                return ShardResult(task.shard, 0, tuple(bad), committed=False)
            *_, record = [writer.commit(skipped=bad) for writer in writers]
        return ShardResult(task.shard, record.samples, tuple(bad), committed=True)

    def _added(self, manifest: Manifest) -> list[str | None]:
        """Streams with commit records of their own, or None for those of the latents."""
        added: list[str | None] = [self.config.add_stream]
        if self.config.add_stream and extracted_class_stream(self.config, manifest):
            added.append(class_name(self.config))
        return added

    @torch.inference_mode()
    def _encode(
        self, manifest: Manifest, images: np.ndarray, moments: list[np.ndarray]
    ) -> dict[str, dict[str, Tensor]]:
        """Arrays to store, stream -> array -> (B, ...), and ``NOT_FINITE``, on the device. Python
        waits for none of it.

        ``images`` is uint8 (B, R, R, 3); ``moments`` is what the latent source read for each.
        """
        pixels = self.feed({"images": torch.from_numpy(images)})["images"].permute(0, 3, 1, 2)
        name = stream_name(self.config)
        arrays = {}
        if self.latents is not None:
            mean, std = self.latents.latents(moments, pixels)
            arrays["latents"] = {"mean": mean, "std": std}
        dtype = getattr(torch, self.precision)
        stored: dict[str, dict[str, Tensor]] = {}
        with torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32):
            cut, tokens = self.config.cut, extracted_class_stream(self.config, manifest)
            stored[name] = values = cut_values(cut, self.teacher, pixels)
            if tokens is not None:
                stored[class_name(self.config)] = class_values(
                    tokens.token, cut, self.teacher, values
                )
        arrays[NOT_FINITE] = {}
        for stream, tensors in stored.items():
            columns = manifest.streams[stream].columns
            arrays[stream] = encode_unchecked(columns, tensors)
            arrays[NOT_FINITE] |= not_finite(columns, tensors)
        return arrays

    def _copy_to_host(self, tensors: dict[str, dict[str, Tensor]]) -> Callable[[], Arrays]:
        """Start copies from the device, which overlap with the next batch; returns a function that
        waits for them and gives the arrays."""
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
    ) -> Iterator[tuple[list[ImageItem], np.ndarray, list[np.ndarray], list[Sequence[np.ndarray]]]]:
        """Batches of items, images uint8 (B, R, R, 3), stored latents and embeddings of captions.

        Batches are cut by position in the shard; bad images are left out and added to ``bad``.
        """
        size = self.config.batch_size
        waiting: deque[list[tuple[ImageItem, Future[Decoded]]]] = deque()
        starts = iter(range(0, len(task.items), size))
        with ThreadPoolExecutor(self.threads, thread_name_prefix="decode") as pool:
            while True:
                while len(waiting) <= BATCHES_AHEAD and (start := next(starts, None)) is not None:
                    batch = task.items[start : start + size]
                    waiting.append([(item, pool.submit(self._decode, item)) for item in batch])
                if not waiting:
                    return
                items, images, stored, contexts = [], [], [], []
                for item, future in waiting.popleft():
                    try:
                        image, latent, context = future.result()
                        items.append(item)
                        images.append(image)
                        stored.append(latent)
                        contexts.append(context)
                    except BadImageError as error:
                        bad.append(SkippedImage(key=item.key, path=item.path, error=str(error)))
                if items:
                    yield items, np.stack(images), stored, contexts

    def _decode(self, item: ImageItem) -> Decoded:
        """The crop, uint8 (R, R, 3), its stored latent and embeddings of captions, empty if there
        are none. Raises ``BadImageError``."""
        crop = self._crop(item)
        latent = np.empty(0) if self.latents is None else self.latents.read(item)
        return crop, latent, () if self.captions is None else self.captions.read(item)

    def _crop(self, item: ImageItem) -> np.ndarray:
        """The crop, uint8 (R, R, 3). Raises ``BadImageError``."""
        try:
            data = self.read(item)
        except UNREADABLE as error:
            raise BadImageError(error.strerror or type(error).__name__) from None
        size, stored = self.config.resolution, item.latent is not None
        return decode_crop(data, size, cropped=stored, crop=self.config.crop)


class CaptionEncoder:
    """Encodes the captions that an extraction adds to a store, without reading images."""

    def __init__(self, config: ExtractConfig, *, device: str, threads: int) -> None:
        torch.set_num_threads(threads)
        self.config = config
        self.device = torch.device(device)
        self.threads = threads
        self.captions = open_captions(config, self.device)

    def describe(self) -> Description:
        text = describe_text(self.config, self.device, self.threads, self.captions)
        compute = text["text"].compute
        return Description(teacher=None, autoencoder=None, compute=compute, **text)

    def describe_tail(self) -> None:
        return None

    def save_tail(self, url: str) -> None:
        return None

    def null_caption(self) -> bytes | None:
        return None if self.captions is None else self.captions.null

    def calibrate(
        self,
        items: Sequence[ImageItem],
        images: int,
        latent_shape: tuple[int, int, int],
        progress: Callable[[int], None] = lambda done: None,
    ) -> Calibration:
        raise NotImplementedError  # captions have fixed steps

    def encode_shard(
        self,
        url: str,
        manifest: Manifest,
        task: ShardTask,
        progress: Callable[[int], None] = lambda done: None,
    ) -> ShardResult:
        """As ``Encoder.encode_shard``."""
        assert self.captions is not None
        name = text_stream_name(self.config)
        stream = manifest.text_streams[name]
        bad: list[SkippedImage] = []
        with ShardWriter(url, manifest, task.shard, added=name) as writer:
            for start in range(0, len(task.items), self.config.batch_size):
                items = list(task.items[start : start + self.config.batch_size])
                contexts = []
                for item in items:
                    try:
                        contexts.append(self.captions.read(item))
                    except BadImageError as error:
                        bad.append(SkippedImage(key=item.key, path=item.path, error=str(error)))
                if bad:  # the samples are those of the store: none can be left out
                    return ShardResult(task.shard, 0, tuple(bad), committed=False)
                arrays = text_arrays(self.captions, stream, items, contexts)
                _write([writer], items, _rows_of(name, arrays))
                progress(start + len(items))
            record = writer.commit()
        return ShardResult(task.shard, record.samples, (), committed=True)


def _rows_of(stream: str, arrays: dict[str, Tensor]) -> Callable[[], Arrays]:
    return lambda: {stream: {part: tensor.cpu().numpy() for part, tensor in arrays.items()}}


def describe_compute(
    config: ExtractConfig,
    device: torch.device,
    precision: Precision,
    threads: int,
    packages: Sequence[str],
) -> ComputeInfo:
    """The arithmetic of an encoder, with the versions of the ``packages`` that it uses."""
    versions = {name: importlib.metadata.version(name) for name in packages}
    versions["torch"] = torch.__version__  # with its build: CUDA versions differ in last bits
    if config.format == "zarr":
        versions["zarr"] = importlib.metadata.version("zarr")
    return ComputeInfo(
        device="cuda" if device.type == "cuda" else "cpu",
        precision=precision,
        batch_size=config.batch_size,
        threads=threads if device.type == "cpu" else 0,
        versions=versions,
    )


def describe_text(
    config: ExtractConfig, device: torch.device, threads: int, captions: CaptionSource | None
) -> dict[str, Any]:
    """The keyword ``text`` of a ``Description``; empty without captions."""
    if captions is None:
        return {}
    packages = ["torch", "numpy", "numcodecs"]
    packages += [] if captions.info.tokenizer_sha256 is None else ["transformers", "tokenizers"]
    compute = describe_compute(config, device, "float32", threads, packages)
    return {"text": TextDescription(captions.info, describe_captions(config, captions), compute)}


def _pinned_copy(tensor: Tensor) -> Tensor:
    """Copy in pinned memory, valid after the device's current stream has done the copy; tensors on
    the CPU, as stored latents are, unchanged."""
    if tensor.device.type == "cpu":
        return tensor
    # Another stream may own the tensor: its memory must not be reused before the copy.
    tensor.record_stream(torch.cuda.current_stream(tensor.device))
    memory = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return memory.copy_(tensor, non_blocking=True)


def _write(
    writers: Sequence[ShardWriter], items: list[ImageItem], wait: Callable[[], Arrays]
) -> None:
    """Add a batch to the shard. Raises ``UserError`` if a value cannot be stored."""
    arrays = wait()
    flags = arrays.pop(NOT_FINITE, {})
    try:
        check_finite({column: torch.from_numpy(rows) for column, rows in flags.items()})
    except NotFiniteError as error:
        item = items[error.rows[0]]
        raise UserError(
            f"shard {writers[0].shard}, sample '{item.key}' ({item.path}): the teacher's {error}; "
            "try --precision float32, or check its weights"
        ) from None
    for row, item in enumerate(items):
        sample: dict[str, dict[str, np.ndarray | int]] = {
            stream: {part: values[row] for part, values in parts.items()}
            for stream, parts in arrays.items()
        }
        if "latents" in sample:
            sample["latents"]["label"] = item.label
        try:
            for writer in writers:
                writer.add(item.key, sample)
        except ValueError as error:
            raise UserError(f"shard {writers[0].shard}: {error}") from None


class BackgroundWriter:
    """A single background thread with a queue of at most ``limit`` calls, run in order.

    A context manager; leaving it waits for the running call and cancels the queued ones.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._queue: deque[Future[Any]] = deque()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="write")

    def __enter__(self) -> BackgroundWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def submit(self, call: Callable[..., Any], *arguments: Any) -> None:
        """Queue a call; blocks while the queue is full. Raises the error of an earlier call."""
        while len(self._queue) >= self._limit or (self._queue and self._queue[0].done()):
            self._queue.popleft().result()
        self._queue.append(self._pool.submit(call, *arguments))

    def finish(self) -> None:
        """Wait for all calls. Raises the first error of one of them."""
        while self._queue:
            self._queue.popleft().result()
