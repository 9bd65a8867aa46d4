"""The options of ``jobs/sample.py``, and what its files say of themselves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationError

from schemas.base import Strict
from schemas.diffusion import Path, SamplerConfig
from schemas.extract import Precision
from schemas.fields import DIGEST, MAX_TEXT, Digest, Layers, Sha256, format_layers, text_or_digest
from schemas.student import ModelName

Positive = Annotated[int, Field(ge=1)]
Labels = Literal["random", "balanced"]
Weights = Literal["ema", "model"]
Arithmetic = Literal["tf32"] | Precision

ABOUT_FILE, LABELS_FILE = "about.json", "labels.npy"
"""Beside the pictures in a folder."""


def _each_once(classes: tuple[int, ...]) -> tuple[int, ...]:
    """A class that is named twice would have twice as many images as the others."""
    for number, times in Counter(classes).items():
        if times > 1:
            raise ValueError(f"class {number} is named {times} times: name each class once")
    return classes


Classes = Annotated[Layers, AfterValidator(_each_once)]


class SampleWorkers(Strict):
    """The processes that draw together; with --num. How many there are changes no image."""

    count: Positive | None = None
    """Workers. Default: one per GPU of the cluster; where it has none one per CPU, 4 at most."""
    gpus_per_worker: Annotated[float, Field(ge=0)] | None = None
    """GPUs of each worker. Default: 1 where the cluster has GPUs, else 0."""
    cpus_per_worker: Annotated[float, Field(gt=0)] = 1
    """CPUs that Ray reserves for each worker; on CPU also its arithmetic threads."""
    max_attempts: Positive = 3
    """How often a batch is tried when the worker that draws it dies."""


class SampleConfig(Strict):
    """Which pictures are drawn, and how."""

    checkpoint: str | None = None
    """Folder or URL of a run or of one checkpoint, or a .pt file of the SiT, REPA or HASTE
    repositories. Of a run the newest checkpoint is taken; for images that were begun, theirs."""
    model: ModelName | None = None
    """What a .pt file holds, for example SiT-XL/2."""
    png: str | None = None
    """A grid of --per-class pictures of each of --classes: the picture file to write, by this
    process alone."""
    num: Positive | None = None
    """So many single images, to --npz or --folder or both, drawn by workers. Interrupted? The same
    command again draws only what is missing."""
    npz: str | None = None
    """With --num: the file or URL to write, as ADM's evaluator reads it: 'arr_0' uint8 (N, R, R,
    3), besides 'labels' int64 (N,) and 'about', a JSON text. Until then finished batches wait in
    the folder NPZ.parts beside it."""
    folder: str | None = None
    """With --num: the folder or URL for one PNG per image (000000.png, ...), labels.npy and
    about.json."""
    labels: Labels = "random"
    """With --num: each image's class, 'random' (uniform, from the seed and the image's number) or
    'balanced' (as many images of each class as of any other, or one more)."""
    classes: Classes | None = None
    """Class numbers, each once: 1,2,3 or 0-9. One row of the grid each, by default class 0; with
    --num the classes to draw from, by default all."""
    per_class: Annotated[int, Field(ge=1, le=1000)] = 8
    """Pictures of each class in the grid."""
    weights: Weights = "ema"
    """Averaged weights, or those of the last step."""
    autoencoder: str | None = None
    """Decoder: hub id or folder. Default: the one that encoded the store; for a .pt file
    stabilityai/sd-vae-ft-ema."""
    batch_size: Positive = 64
    """Pictures drawn at a time. The same image from a batch of another size may round otherwise."""
    precision: Literal["auto"] | Arithmetic = "auto"
    """Arithmetic of the student; the sampler's is float64. 'auto' is tf32 on GPUs (float32 weights
    and activations, products in TensorFloat-32: what SiT, REPA and HASTE sampled their published
    numbers with), float32 on CPUs. The decoder is not autocast: float32, or TF32 with 'tf32'."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute."""
    sampler: SamplerConfig = SamplerConfig()
    workers: SampleWorkers = SampleWorkers()
    ray_address: str | None = None
    """With --num: Ray cluster to join ('auto' for the one on this node). Default: RAY_ADDRESS, else
    a private local one."""
    as_json: Annotated[bool, Field(alias="json")] = False
    """Print one line of JSON on stdout."""


class Sampling(Strict):
    """How images were drawn, whatever drew them and whichever weights: what two sets have in common
    where their distances from one reference can be compared."""

    sampler: SamplerConfig
    """Without an interval where there is no guidance."""
    labels: Labels
    classes: Annotated[str, Field(max_length=MAX_TEXT)]
    """Those that were drawn from, such as 0-999; a digest of very many pieces."""
    decoder_sha256: Digest
    precision: Arithmetic

    @classmethod
    def of(
        cls,
        sampler: SamplerConfig,
        *,
        labels: Labels,
        classes: Sequence[int],
        decoder_sha256: str,
        precision: Arithmetic,
    ) -> Sampling:
        """``decoder_sha256`` is that of the autoencoder's weights, all of it."""
        return cls(
            sampler=sampler.in_force,
            labels=labels,
            classes=text_or_digest(format_layers(classes)),
            decoder_sha256=decoder_sha256[:DIGEST],
            precision=precision,
        )


class SampleAbout(Strict):
    """What a set of images is. Sets that agree in all of it, but for where the checkpoint lies and
    which version drew, are the same images."""

    checkpoint: str
    """Folder or file; elsewhere it may be the same one."""
    step: int | None
    """Training step; a .pt file does not say."""
    model: str
    weights: Weights
    weights_sha256: Sha256
    path: Path
    autoencoder: str
    autoencoder_sha256: Sha256
    image_size: int
    """Pixels per side."""
    num: int
    labels: Labels
    classes: tuple[int, ...]
    """Those that were drawn from."""
    batch_size: int
    precision: Arithmetic
    device: Literal["cpu", "cuda"]
    sampler: SamplerConfig
    version: str
    """Of this software."""

    @property
    def sampling(self) -> Sampling:
        """How they were drawn."""
        return Sampling.of(
            self.sampler,
            labels=self.labels,
            classes=self.classes,
            decoder_sha256=self.autoencoder_sha256,
            precision=self.precision,
        )

    @classmethod
    def parse_or_none(cls, values: Any) -> SampleAbout | None:
        """What a file's JSON says, or None where it is nothing that this version knows."""
        try:
            return cls.model_validate(values)
        except ValidationError:
            return None
