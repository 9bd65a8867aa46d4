"""What a training run is: the options of ``jobs/train_haste.py``."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from schemas.alignment import AlignmentConfig
from schemas.base import Strict
from schemas.diffusion import DiffusionConfig, SamplerConfig
from schemas.fields import Layers, ModelArguments, ModelId
from schemas.student import StudentConfig

Positive = Annotated[int, Field(ge=1)]
OnBadShard = Literal["stop", "quarantine"]


class OptimizerConfig(Strict):
    """AdamW, as SiT, REPA and HASTE set it."""

    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    """Constant learning rate."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's moment decays."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """AdamW's epsilon."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Gradients are clipped to this global L2 norm."""


class DataConfig(Strict):
    """How the store is streamed."""

    window: Positive = 8
    """Shards whose samples are shuffled together."""
    prefetch: Positive = 2
    """Batches read ahead."""
    verify: bool = True
    """Check each sample's checksum the first time a worker reads it."""
    on_bad_shard: OnBadShard = "stop"
    """What to do with a damaged shard: 'stop' names it; 'quarantine' replaces what cannot be read
    by the next sample that can, and leaves the shard out from the next epoch on, as long as these
    are few: at most 10 shards or a tenth of them (half of a store of less than 20)."""
    threads: Positive = 8
    """Threads of each worker that fetch and decompress."""
    memory_gb: Annotated[float, Field(ge=0)] = 1.0
    """Files of a remote store that a worker holds whole while it draws from them, in GB; beyond, it
    reads rows. Local files are read row by row: the system keeps them in memory."""
    cache_dir: str | None = None
    """Local folder that keeps shards of remote stores over epochs and runs. Workers of a node share
    it; it pays where cache_gb holds all that they read, as files are fetched whole for it."""
    cache_gb: Annotated[float, Field(gt=0)] = 100.0
    """Size of that folder at most, in GB; what was used longest ago makes room."""


class WorkersConfig(Strict):
    """The processes that train together."""

    count: Positive = 1
    """Workers; the global batch is shared out between them."""
    min_count: Positive | None = None
    """Elastic: train on as few workers as this while the cluster has no room for more; the global
    batch stays. Default: always 'count'."""
    micro_batch: Positive | None = None
    """Samples of one forward pass on a worker; gradients accumulate over its share of the global
    batch. Default: the whole share at once."""
    gpus_per_worker: Annotated[float, Field(ge=0)] | None = None
    """GPUs of each worker. Default: 1 where the cluster has GPUs, else 0."""
    cpus_per_worker: Annotated[float, Field(gt=0)] = 1
    """CPUs that Ray reserves for each worker; on CPU also its arithmetic threads."""
    max_failures: Annotated[int, Field(ge=-1)] = 3
    """How often a run restarts from its newest checkpoint when a worker dies; -1: without limit."""

    @model_validator(mode="after")
    def _range_is_ordered(self) -> WorkersConfig:
        if self.min_count is not None and self.min_count > self.count:
            raise ValueError(f"min_count {self.min_count} is more than count {self.count}")
        return self


class ComputeConfig(Strict):
    """How a step is computed. None of it changes what is computed, beyond rounding."""

    compile: Literal["auto", "on", "off"] = "auto"
    """Compile the student's blocks and the losses (torch.compile); 'auto': on GPUs. It takes
    minutes once, and a C++ compiler on CPUs."""
    attention_loss: Literal["fused", "plain"] = "fused"
    """'fused' computes the maps twice rather than keep them for the backward pass; 'plain' is the
    formula as it stands, and what other token grids than the teacher's take."""
    optimizer: Literal["fused", "plain"] = "fused"
    """'fused' updates all weights in one kernel; 'plain' is a loop over them. A resumed run goes on
    as its checkpoint was written."""


class CheckpointConfig(Strict):
    """What is kept of a run."""

    every: Positive = 10_000
    """Steps between checkpoints; the last step always makes one."""
    keep: Positive = 3
    """Newest checkpoints that are kept."""


class RunEvaluationConfig(Strict):
    """A small Fréchet distance while a run trains, of images of random classes."""

    images: Annotated[int, Field(ge=2)] | None = None
    """Images to draw each time; none: no evaluation. Few images bias the distance upwards: compare
    it between runs of as many."""
    every: Positive | None = None
    """Steps between evaluations; the last step makes one too. Default: those of the grids."""
    reference: str | None = None
    """Statistics of real images that jobs/evaluate.py --save-reference wrote with the same
    network, or ADM's."""
    network: ModelId | None = None
    """A timm network in place of Inception."""
    network_weights: str | None = None
    """Its weights: FILE (a classifier's, too), 'hub' or 'random' (of the seed)."""
    network_size: Annotated[int, Field(ge=8, le=2048)] | None = None
    """Pixels per side of what it sees. Default: its own."""
    network_args: ModelArguments = Field(default={})
    """Arguments of timm.create_model, such as num_heads."""
    inception_weights: str | None = None
    """The Inception network's weights: a file, or 'hub' (default)."""
    seed: int = 0
    """Of random weights."""

    @model_validator(mode="after")
    def _is_whole(self) -> RunEvaluationConfig:
        if self.network is None and (self.network_size or self.network_args):
            raise ValueError("network_size and network_args go with a network")
        if self.network is not None and self.inception_weights is not None:
            raise ValueError("network and inception_weights: the distance is of one of them")
        if self.images is None:
            if self.every is not None:
                raise ValueError("images is missing: how many to draw each time")
            return self
        if self.reference is None:
            raise ValueError("reference is missing: statistics of jobs/evaluate.py")
        if (self.network is None) != (self.network_weights is None):
            raise ValueError("network and network_weights go together")
        return self


class SamplesConfig(Strict):
    """Pictures that the averaged weights draw while they are trained: of the same noise and classes
    every time, shared out between the workers."""

    every: Positive | None = None
    """Steps between grids of samples (samples/step-STEP.png in the run's folder); the last step
    makes one too. Default: none."""
    classes: Layers | None = None
    """Class numbers, one row of the grid each: 1,2,3 or 0-9. Default: the first eight."""
    per_class: Annotated[int, Field(ge=1, le=100)] = 4
    """Pictures of each class."""
    batch_size: Positive = 16
    """Pictures that a worker draws at a time."""
    autoencoder: str | None = None
    """Decoder: hub id or folder. Default: the one that encoded the store."""
    sampler: SamplerConfig = SamplerConfig(steps=50)
    evaluate: RunEvaluationConfig = RunEvaluationConfig()

    @model_validator(mode="after")
    def _evaluation_has_steps(self) -> SamplesConfig:
        if self.evaluate.images is not None and (self.evaluate.every or self.every) is None:
            raise ValueError("evaluate.images without evaluate.every: say how often")
        return self


class RunConfig(Strict):
    """Options of one training run."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = "run"
    """Name of the run. A run of the same name in the same output continues where it stopped."""
    output: str = "runs"
    """Folder that holds the runs."""
    store: str | None = None
    """Folder or URL of the store to train on."""
    steps: Positive = 400_000
    """Optimizer steps."""
    global_batch: Positive = 256
    """Samples of one step, over all workers."""
    seed: int = 0
    """Seed of initialisation, sample order, noise, timesteps and label drops."""
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.9999
    """Decay of the averaged weights, from the first step on."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Autocast dtype; 'auto' is bfloat16 on GPUs, float32 on CPUs. float16 is none: gradients of
    means over a batch lie below its smallest numbers."""
    log_every: Positive = 100
    """Steps between rows of the metrics file; each row is the mean since the last."""
    profile: Annotated[int, Field(ge=1)] | None = None
    """Step at which the first worker records a trace of two steps (torch profiler), for
    chrome://tracing or ui.perfetto.dev: trace-STEP.json in the run's folder."""
    wandb: str | None = None
    """Weights & Biases project to log to as well (needs the extra 'wandb')."""
    ray_address: str | None = None
    """Ray cluster to join ('auto' for the one on this node). Default: RAY_ADDRESS, else a private
    local one."""
    student: StudentConfig = StudentConfig()
    diffusion: DiffusionConfig = DiffusionConfig()
    alignment: AlignmentConfig = AlignmentConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    data: DataConfig = DataConfig()
    workers: WorkersConfig = WorkersConfig()
    compute: ComputeConfig = ComputeConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    samples: SamplesConfig = SamplesConfig()

    @model_validator(mode="after")
    def _alignment_fits_student(self) -> RunConfig:
        depth = self.student.size.depth
        alignment = self.alignment
        if alignment.feature_weight and alignment.feature_depth > depth:
            raise ValueError(
                f"alignment.feature_depth {alignment.feature_depth} is beyond the student's "
                f"{depth} blocks"
            )
        if alignment.attention_weight and max(alignment.student_layers) >= depth:
            raise ValueError(
                f"alignment.student_layers asks for block {max(alignment.student_layers)}; the "
                f"student has blocks 0 to {depth - 1}"
            )
        if self.student.family == "DiT" and self.diffusion.path != "linear":
            raise ValueError(
                f"diffusion.path {self.diffusion.path} is for SiT; {self.student.model} has a "
                "noise schedule of its own"
            )
        if self.global_batch < self.workers.count:
            raise ValueError(
                f"global_batch {self.global_batch} leaves some of {self.workers.count} workers "
                "without a sample"
            )
        return self
