"""Options of all benchmarks, without what they import, so that ``--help`` needs no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from schemas.base import Strict
from schemas.codecs import CalibratedSet
from schemas.extract import Cut, TeacherConfig
from schemas.fields import Layers
from schemas.student import ModelName


class BenchOptions(Strict):
    as_json: Annotated[bool, Field(alias="json")] = False
    """Print one JSON object instead of tables."""
    threads: Annotated[int, Field(ge=1)] = 1
    """Arithmetic threads of torch; one gives the times of a single core."""


class FrontierOptions(BenchOptions):
    """Images, teachers and codec variants."""

    images: str | None = None
    """Folder of photographs. Default: shared/data/imagenet_sample beside the project where it is,
    else cut-outs of scikit-learn's photographs."""
    count: int = Field(default=8, ge=1)
    """Number of images."""
    weights: tuple[str, ...] = ("plain", "planted")
    """'plain' (the project's random weights, whose attention is as spread as a trained model's),
    'planted' (the same with massive channels and loud tokens), 'register' and 'dinov3' (DINOv2's
    and DINOv3's shape with registers, which are the loud tokens), 'hub' or a file: see
    --teacher.weights of pipeline.extract."""
    sharpness: float = 0.8
    """Factor on queries and keys of 'planted', which keeps attention no sharper than a trained
    model's."""
    teacher: TeacherConfig = TeacherConfig()
    """Shape of the teacher. Its weights are those of --weights."""
    resolution: int = 256
    """Pixels per side of the crops."""
    layers: Layers = (7, 8, 9, 10, 11)
    """Layers that a store of activations serves: its tokens enter the first of them."""
    measured: Layers = (8, 9, 10, 11)
    """Layers that a run reads; stores of maps and factors hold only these."""
    cuts: tuple[Literal["activations", "qk", "maps", "image"], ...] = (
        "activations",
        "qk",
        "maps",
        "image",
    )
    """Cuts to measure."""
    singles: bool = True
    """Also measure single codecs, not only the sets of --codec."""
    match: str = ""
    """Regular expression: only variants whose name matches it are measured."""

    @model_validator(mode="after")
    def _check_layers(self) -> FrontierOptions:
        if not set(self.measured) <= set(self.layers):
            raise ValueError("measured layers must be among the stored layers")
        return self


class CalibrationOptions(FrontierOptions):
    """Images, teachers and codecs."""

    weights: tuple[str, ...] = ("plain", "planted", "register", "dinov3")
    """As of the frontier; steps were tuned on 'plain' and 'planted'."""
    measured: Layers = (7, 8, 9, 10, 11)
    """Layers whose errors count: those that a store serves."""
    cuts: tuple[Literal["activations", "qk", "maps"], ...] = ("activations",)
    """Cuts to measure."""
    codecs: tuple[CalibratedSet, ...] = ("faithful", "small")
    """Codec sets to measure."""
    calibrated: int = Field(default=16, ge=1)
    """Images that choose the steps; --count are others, on which errors are measured."""


class BackendsOptions(BenchOptions):
    """Places, stores and repetitions."""

    places: tuple[Literal["disk", "s3"], ...] = ("disk", "s3")
    """'disk' is a temporary folder of this machine, 's3' SeaweedFS on its loopback."""
    forms: tuple[
        Literal["tiny", "activations faithful", "activations int8 uncompressed", "maps float16"],
        ...,
    ] = ("activations faithful", "activations int8 uncompressed", "maps float16")
    """Stores to measure."""
    repeats: int = Field(default=3, ge=1)
    """Rounds in which each method is timed once; medians are reported."""
    cache: Literal["warm", "cold"] = "warm"
    """On disk: 'cold' drops the files from the page cache before each timing."""


class StepOptions(BenchOptions):
    """Step, device and repetitions."""

    student: ModelName = "SiT-B/2"
    """The student, at its published size and with its published alignment."""
    cut: Literal["maps", "qk", "activations", "image"] = "maps"
    """Cut of the teacher in the store (DINOv2-B, 256 px)."""
    batch: int | None = Field(default=None, ge=1)
    """Samples of a step. Default: 4 on a CPU, 128 on a GPU."""
    rounds: int = Field(default=7, ge=1)
    """Rounds in which each step is timed once; ratios are of one round, medians are reported."""
    steps: int | None = Field(default=None, ge=1)
    """Steps of one timing. Default: 1 on a CPU, 10 on a GPU."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Default: the GPU where one is available."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Autocast dtype, as in training."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Same as compute.compile in training."""
    recipe: tuple[str, ...] = ()
    """Names of configs in jobs/configs, such as sit_b2_irepa: also measure Phase I with their
    alignment, for the same student."""
    plain: bool = True
    """Also measure Phase I with the plain attention loss and optimizer."""
    memory: bool = True
    """Also measure peak memory; on a CPU that takes a new process for each step."""
    depth: int | None = Field(default=None, ge=2)
    """Blocks of the student, for a quick measurement."""
    width: int | None = Field(default=None, ge=4)
    """Width of the student, for a quick measurement."""
    peer: Path | None = None
    """Checkout of the HASTE or REPA repository: also measure its step, with an online teacher, on
    the same shapes."""
    profile: Path | None = None
    """Folder for traces of two steps of each phase, for chrome://tracing."""


class ArithmeticOptions(BenchOptions):
    """Student, batch and rates."""

    student: ModelName = "SiT-XL/2"
    """Student that is trained."""
    depth: int | None = Field(default=None, ge=1)
    """Blocks of the student, for a quick count."""
    width: int | None = None
    """Tokens' width, for a quick count."""
    heads: int | None = None
    """Heads of the student's attention."""
    batch: int = Field(default=32, ge=2)
    """Samples of a forward pass."""
    tapped: int = Field(default=4, ge=0)
    """Blocks whose attention is aligned."""
    tflops: float = Field(default=550.0, gt=0)
    """10^12 FLOP per second of matrix products."""
    tb_per_second: float = Field(default=3.0, gt=0)
    """10^12 bytes per second of other kernels."""
    baseline: Path | None = None
    """Checkout of an earlier version to count beside this one."""


class LoaderOptions(BenchOptions):
    """Stores and repetitions."""

    forms: tuple[str, ...] = ("activations int8 uncompressed", "activations faithful")
    """Stores to measure; ratios of the first one are the headline."""
    rounds: int = Field(default=5, ge=1)
    """Rounds in which each method reads the store once; ratios are of one round, medians are
    reported."""
    batch: int = Field(default=32, ge=1)
    """Samples of a batch of the loader."""
    workers: int = Field(default=1, ge=1)
    """Threads of the loader. All share one core, except where waiting is measured."""
    rate: float = Field(default=600.0, gt=0)
    """Samples per second of the consumer whose waiting is measured."""
    seconds: float = Field(default=3.0, gt=0)
    """Duration of that measurement."""
    streams: tuple[str, ...] = ()
    """Streams of one run, such as latents,text,activations: measure them with and without the
    captions, in the first of the forms instead of all."""

    baseline: Path | None = None
    """Checkout of another version of this project (git worktree add FOLDER COMMIT): also measure
    its loader, on stores that it writes."""


class SamplingOptions(BenchOptions):
    """Batch, steps, repetitions and the build to compare with."""

    batch: int = Field(default=64, ge=1)
    """Images of a batch."""
    steps: int = Field(default=50, ge=2)
    """Steps of the SDE sampler."""
    rounds: int = Field(default=3, ge=1)
    """Rounds in which each build draws one batch in a new process; ratios are of one round, medians
    are reported."""
    baseline: Path | None = None
    """Checkout of another version of this project, measured in the same rounds."""


class EvaluationOptions(BenchOptions):
    """Sizes of the sets of features."""

    count: int = Field(default=50_000, ge=64)
    """Features of each set whose FID is computed."""
    manifold: int = Field(default=10_000, ge=64)
    """Features of each set whose precision and recall are computed; time grows with the square."""
    width: int = Field(default=2048, ge=2)
    """Numbers of a feature."""


class ExtractOptions(BenchOptions):
    """Networks, device and number of images."""

    networks: Literal["imagenet", "demo"] = "imagenet"
    """'imagenet': DINOv2-B and Stable Diffusion's autoencoder at 256 px, with random weights;
    'demo': the demo's small ones at 32 px."""
    cut: Cut = "activations"
    """Cut of the teacher that is stored."""
    images: int | None = Field(default=None, ge=1)
    """Images of a round. Default: 4 on a CPU, 1024 on a GPU."""
    batch: int | None = Field(default=None, ge=1)
    """Images of a forward pass. Default: 2 on a CPU, 64 on a GPU."""
    rounds: int = Field(default=3, ge=1)
    """Rounds in which both are timed once; shares are of one round, medians are reported."""
    decoders: int = Field(default=8, ge=1)
    """Decoding threads on a GPU; on a CPU --threads is used."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Default: the GPU where one is available."""


class OptimizerOptions(BenchOptions):
    """Student, device and repetitions."""

    student: ModelName = "SiT-B/2"
    """Model whose weights are updated."""
    depth: int | None = Field(default=None, ge=1)
    """Blocks of the student, for a quick measurement."""
    rounds: int = Field(default=7, ge=1)
    """Rounds in which each variant is timed once; medians are reported."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Default: the GPU where one is available."""


class AttentionOptions(BenchOptions):
    """Shapes, device and repetitions."""

    batch: int | None = Field(default=None, ge=1)
    """Samples. Default: 4 on a CPU, 32 on a GPU."""
    layers: int = Field(default=4, ge=1)
    """Tapped layers."""
    heads: int = Field(default=12, ge=1)
    """Heads per layer that the loss reads."""
    tokens: int = Field(default=256, ge=1)
    """Patches of the student and of the teacher."""
    head_width: int = Field(default=72, ge=1)
    """Head width of the student: 72 in SiT-XL, 64 in SiT-B."""
    rounds: int = Field(default=7, ge=1)
    """Rounds in which each variant is timed once; medians are reported."""
    compiled: bool = True
    """Also time the compiled loss."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Default: the GPU where one is available; operands are bfloat16 there."""


class TableOptions(BenchOptions):
    """Benches and time budget."""

    budget: float = Field(default=570.0, gt=0)
    """Seconds for all of them; benches without time left are named."""
    only: str = ""
    """Only benches whose command contains this text; 'tiny' is a smoke test."""
    peer: Path | None = None
    """Checkout of the HASTE or REPA repository, for the steps with cut 'maps'."""


class GrowthOptions(BenchOptions):
    """Sizes of data sets, and length of the memory measurement."""

    samples: tuple[int, ...] = (1_281_167, 100_000_000)
    """Samples of the simulated data sets."""
    batch: int = Field(default=256, ge=1)
    """Samples of a step of one worker."""
    steps: int = Field(default=10_000, ge=5)
    """Steps over which memory is measured, over many epochs of a small store."""


class ShuffleOptions(BenchOptions):
    """Labels of a data set, and the batches drawn from it."""

    samples: int = Field(default=1_281_167, ge=1)
    """Samples of the store."""
    classes: int = Field(default=1000, ge=1)
    """Classes, of about equal size."""
    shard_size: int = Field(default=64, ge=1)
    """Samples of a shard."""
    batch: int = Field(default=256, ge=1)
    """Samples of a step, over all workers."""
    batches: int = Field(default=200, ge=1)
    """Number of measured steps, spread over an epoch."""
    windows: tuple[int, ...] = (1, 2, 4, 8, 16, 64, 256, 1024)
    """Shards whose samples are shuffled together."""


class CommandsOptions(BenchOptions):
    """Commands, repetitions and the build to compare with."""

    baseline: Path | None = None
    """Checkout of another version of this project, measured in the same rounds."""
    rounds: int = Field(default=3, ge=1)
    """Rounds in which each command answers once; medians are reported."""
    starts: int = Field(default=1, ge=0)
    """Measurements of the time until the first shard and the first training step; 0 for none."""
    only: str = ""
    """Only answers of commands that contain this text."""


class PixelsOptions(BenchOptions):
    """Student and images."""

    checkpoint: str
    """Run folder or checkpoint of a student of classes, such as runs/demo."""
    autoencoder: str | None = None
    """Decoder: hub id or folder. Default: the one that encoded the store."""
    images: int = Field(default=80, ge=2)
    """Images of each arithmetic."""
    steps: int = Field(default=50, ge=1)
    """Steps of the samplers."""
    guidance: float = Field(default=2.0, ge=1)
    """Guidance scale."""
    methods: tuple[Literal["sde", "ode", "ode_heun"], ...] = ("ode", "sde")
    """Samplers."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device; 'auto' is the GPU if there is one."""


class ResumeOptions(BenchOptions):
    """Student, repetitions and the build to compare with."""

    student: ModelName = "SiT-B/2"
    """Model of the run."""
    depth: int | None = Field(default=None, ge=1)
    """Blocks of the student, where the state of all does not fit the memory."""
    baseline: Path | None = None
    """Checkout of another version of this project, measured in the same rounds."""
    rounds: int = Field(default=3, ge=1)
    """Rounds in which each build runs once; medians are reported."""
    every: int = Field(default=100, ge=1)
    """Steps between checkpoints."""


class CheckpointOptions(ResumeOptions):
    """Student, repetitions and the build to compare with."""

    rounds: int = Field(default=1, ge=1)
    """Rounds in which each build runs once; medians are reported."""
    every: int = Field(default=24, ge=3)
    """Steps between checkpoints, longer than one takes to write."""
    workers: int = Field(default=1, ge=1)
    """More than one: measure instead how long so many workers of this build write a checkpoint
    together, beside one alone."""


class ScalingOptions(BenchOptions):
    """Workers, work and repetitions."""

    works: tuple[Literal["extraction", "training"], ...] = ("extraction", "training")
    """Work to measure: the demo's, which is fixed."""
    workers: tuple[Annotated[int, Field(ge=1, le=8)], ...] = (1, 2, 4)
    """Numbers of workers of one thread, at most 8; '[]' measures the driver only."""
    rounds: int = Field(default=5, ge=1)
    """Rounds in which both ways do the work once; ratios are of one round, medians are reported."""
    steps: int = Field(default=60, ge=10)
    """Steps of a training, of which the first fifth is not measured."""
    encoders: int = Field(default=1000, ge=0)
    """Simulated encoders of the driver; 0 leaves it out."""
    shards: int = Field(default=5000, ge=1)
    """Shards that they commit."""


OPTIONS: dict[str, type[BenchOptions]] = {
    "frontier": FrontierOptions,
    "calibration": CalibrationOptions,
    "backends": BackendsOptions,
    "step": StepOptions,
    "loader": LoaderOptions,
    "sampling": SamplingOptions,
    "pixels": PixelsOptions,
    "evaluation": EvaluationOptions,
    "extract": ExtractOptions,
    "optimizer": OptimizerOptions,
    "attention": AttentionOptions,
    "arithmetic": ArithmeticOptions,
    "table": TableOptions,
    "growth": GrowthOptions,
    "shuffle": ShuffleOptions,
    "commands": CommandsOptions,
    "checkpoint": CheckpointOptions,
    "resume": ResumeOptions,
    "scaling": ScalingOptions,
}
"""By the name of the bench."""
