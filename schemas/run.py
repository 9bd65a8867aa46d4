"""Options of ``jobs/train_haste.py``: the config of a training run."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from schemas.alignment import AlignmentConfig, place
from schemas.base import Strict
from schemas.classes import Classes
from schemas.diffusion import CLASS_WEIGHT, DiffusionConfig, SamplerConfig
from schemas.fields import ModelArguments, ModelId, is_none
from schemas.student import StudentConfig

Positive = Annotated[int, Field(ge=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]
OnBadShard = Literal["stop", "quarantine"]


class OptimizerConfig(Strict):
    """AdamW, with the settings of SiT, REPA and HASTE."""

    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    """Constant learning rate."""
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """Decay rates of the moments."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """Epsilon of the denominator."""
    max_grad_norm: Annotated[float, Field(gt=0, allow_inf_nan=True)] = 1.0
    """Global L2 norm to which gradients are clipped; inf: no clipping."""


class DataConfig(Strict):
    """Options of the data loader."""

    window: Positive = 8
    """Shards whose samples are shuffled together: the shuffle window."""
    prefetch: Positive = 2
    """Batches that are read in advance."""
    verify: bool = True
    """Check each sample's checksum the first time a worker reads it."""
    on_bad_shard: OnBadShard = "stop"
    """Handling of a damaged shard: 'stop' reports it; 'quarantine' replaces each unreadable sample
    by the next readable one and leaves the shard out from the next epoch on. The run stops when
    damaged shards exceed both 10 and a tenth of all (half, if the store has less than 20)."""
    threads: Positive = 8
    """Threads of each worker that read and decompress."""
    memory_gb: Annotated[float, Field(ge=0)] = 1.0
    """Memory of each worker, in GB, for whole files of a remote store; without room for a file,
    only the needed rows are read. Local files are always read by rows: the system caches them."""
    cache_dir: str | None = None
    """Local folder that caches shards of remote stores over epochs and runs, shared by the workers
    of a node. Whole files are fetched for it, so cache_gb should hold all files that they read."""
    cache_gb: Annotated[float, Field(gt=0)] = 100.0
    """Maximum size of cache_dir, in GB; the least recently used files are deleted."""
    holdout: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.0, exclude_if=lambda value: value == 0
    )
    """Part of the samples (0.01: one in a hundred) that is never trained on, for validation.every:
    a function of their keys alone, so that it is the same for all runs, shards and codecs."""


class TrainConfig(Strict):
    """Handling of steps whose loss or gradient norm is not finite."""

    on_nan: Literal["stop", "skip_step"] = "stop"
    """Handling of a step whose loss or gradient norm is not finite on any worker: 'stop' ends the
    run within log_every steps and writes no checkpoint after it; 'skip_step' leaves weights,
    averages and optimizer unchanged by it. A run whose weights are not finite always stops."""
    max_skipped: Positive = 10
    """Steps in a row that 'skip_step' skips; the run stops at the next one."""


class WorkersConfig(Strict):
    """The worker processes of a run."""

    count: Positive = 1
    """Workers, among which the global batch is divided."""
    min_count: Positive | None = None
    """Elastic training: minimum number of workers while the cluster has no room for 'count'. The
    global batch does not change. Default: 'count'."""
    micro_batch: Positive | None = None
    """Samples per forward pass of a worker; gradients accumulate over its share of the global
    batch. Default: the whole share."""
    gpus_per_worker: Annotated[float, Field(ge=0)] | None = None
    """GPUs of each worker. Default: 1 where the cluster has GPUs, else 0."""
    cpus_per_worker: Annotated[float, Field(gt=0)] = 1
    """CPUs that Ray reserves for each worker; on CPU also its arithmetic threads."""
    max_failures: Annotated[int, Field(ge=-1)] = 3
    """Maximum number of restarts from the newest checkpoint when a worker dies; -1: no limit."""

    @model_validator(mode="after")
    def _range_is_ordered(self) -> WorkersConfig:
        if self.min_count is not None and self.min_count > self.count:
            raise ValueError(f"min_count {self.min_count} is more than count {self.count}")
        return self


class ComputeConfig(Strict):
    """Implementations of a training step. They change results by rounding only."""

    compile: Literal["auto", "on", "off"] = "auto"
    """Compile the student's blocks and the losses (torch.compile); 'auto': on GPUs. It takes
    minutes at the start, and needs a C++ compiler on CPUs."""
    attention_loss: Literal["fused", "plain"] = "fused"
    """'fused' recomputes the attention maps in the backward pass to save memory; 'plain' follows
    the formula, and is used anyway if the student's token grid differs from the teacher's."""
    optimizer: Literal["fused", "plain"] = "fused"
    """'fused' updates all weights in one kernel; 'plain' loops over them. A resumed run continues
    with the choice in its checkpoint."""
    shard: Literal["none", "fsdp2"] = Field(
        default="none", exclude_if=lambda value: value == "none"
    )
    """'fsdp2' divides weights, their averages, gradients and AdamW's state among the workers, for
    students that one GPU cannot hold; 'none' copies them to each. A run may change it on resume."""
    deterministic: bool = Field(default=False, exclude_if=lambda value: value is False)
    """Use only GPU kernels that add in a fixed order, so that a run repeats to the last bit, as on
    CPUs; slower. An operation without such a kernel ends the run."""
    cuda_graphs: bool = Field(default=False, exclude_if=lambda value: value is False)
    """On a GPU, launch a step as one CUDA graph, for small students, whose kernels take less time
    than Python needs to launch them. The memory of a step stays reserved between steps. One worker
    with the fused optimizer only. Rehearsed, but not yet tried on a GPU."""

    @model_validator(mode="after")
    def _graphs_have_their_optimizer(self) -> ComputeConfig:
        if self.cuda_graphs and self.optimizer != "fused":
            raise ValueError(
                "cuda_graphs needs compute.optimizer fused, which counts its steps on the GPU"
            )
        return self


class CheckpointConfig(Strict):
    """Checkpoints of a run."""

    every: Positive = 10_000
    """Steps between checkpoints; the last step always writes one."""
    keep: Positive = 3
    """Number of newest checkpoints that are kept."""
    background: bool = Field(default=True, exclude_if=lambda value: value is True)
    """Write checkpoints while the training goes on, from a copy in the hosts' memory: 16 bytes per
    weight in all (SiT-XL/2: 11 GB), of which each of several workers holds and writes an equal
    share. false: the training waits for the disk."""


class RunEvaluationConfig(Strict):
    """Fréchet distance of a few images of random classes during training."""

    images: Annotated[int, Field(ge=2)] | None = None
    """Images per evaluation; none: no evaluation. Few images bias the distance upwards: compare
    runs with the same number only."""
    every: Positive | None = None
    """Steps between evaluations; the last step is evaluated too. Default: samples.every."""
    reference: str | None = None
    """Statistics of real images: a file of jobs/evaluate.py --save-reference for the same network,
    or ADM's."""
    network: ModelId | None = None
    """A timm network instead of Inception."""
    network_weights: str | None = None
    """Weights of the network: FILE (a classifier is accepted), 'hub' or 'random' (from seed)."""
    network_size: Annotated[int, Field(ge=8, le=2048)] | None = None
    """Pixels per side of the network's input. Default: its own."""
    network_args: ModelArguments = Field(default={})
    """Arguments of timm.create_model, such as num_heads."""
    inception_weights: str | None = None
    """Weights of the Inception network: a file, or 'hub' (default)."""
    seed: int = 0
    """Seed of random weights."""

    @model_validator(mode="after")
    def _is_whole(self) -> RunEvaluationConfig:
        if self.network is None and (self.network_size or self.network_args):
            raise ValueError("network_size and network_args go with a network")
        if self.network is not None and self.inception_weights is not None:
            raise ValueError("network and inception_weights exclude each other")
        if self.images is None:
            if self.every is not None:
                raise ValueError("images is missing: the number of images per evaluation")
            return self
        if self.reference is None:
            raise ValueError("reference is missing: statistics of jobs/evaluate.py")
        if (self.network is None) != (self.network_weights is None):
            raise ValueError("network and network_weights go together")
        return self


class SamplesConfig(Strict):
    """Images sampled from the averaged weights during training, with the same noise and classes or
    captions every time, by all workers."""

    every: Positive | None = None
    """Steps between grids of samples (samples/step-STEP.png in the run's folder); the last step
    writes one too. Default: no grids."""
    classes: Classes | None = None
    """Numbers or names of classes, one per row of the grid: 1,2,3 or 0-9 or tabby,otter; name:7 is
    the class called 7. Default: the first eight with images."""
    captions: str | None = Field(default=None, exclude_if=is_none)
    """MMDiT: file of captions to draw, as of jobs/sample.py --captions; up to eight in grids."""
    store: str | None = Field(default=None, exclude_if=is_none)
    """MMDiT: store whose captions are drawn, such as one of validation images. Default: the store
    that the run is trained on."""
    per_class: Annotated[int, Field(ge=1, le=100)] = 4
    """Images per class or caption."""
    batch_size: Positive = 16
    """Images per batch of a worker."""
    autoencoder: str | None = None
    """Decoder: hub id or folder. Default: the one that encoded the store."""
    sampler: SamplerConfig = SamplerConfig(steps=50)
    evaluate: RunEvaluationConfig = RunEvaluationConfig()

    @model_validator(mode="after")
    def _captions_have_one_place(self) -> SamplesConfig:
        if self.captions is not None and self.store is not None:
            raise ValueError("captions and store exclude each other")
        return self

    @model_validator(mode="after")
    def _evaluation_has_steps(self) -> SamplesConfig:
        if self.evaluate.images is not None and (self.evaluate.every or self.every) is None:
            raise ValueError("evaluate.images needs evaluate.every")
        return self


class ValidationConfig(Strict):
    """Denoising loss of samples that are not trained on, at fixed times and with fixed noise, of
    averaged weights and of weights as trained. Nothing is sampled."""

    every: Positive | None = None
    """Steps between measurements; the last step is measured too. Default: none."""
    samples: Positive = 1024
    """Samples of each measurement, always the same; all, where there are fewer."""
    times: Annotated[tuple[Annotated[float, Field(ge=0, lt=1)], ...], Field(min_length=1)] = (
        *(0.0625, 0.1875, 0.3125, 0.4375),
        *(0.5625, 0.6875, 0.8125, 0.9375),
    )
    """Times at which each sample is measured, from 0 (data) to 1 (noise)."""
    store: str | None = None
    """Another store whose samples are used, instead of the part data.holdout of the run's: with the
    same autoencoder and, where the student has one, class stream."""
    batch_size: Positive = 64
    """Samples per forward pass. Batches are the same for any number of workers."""
    seed: int = 0
    """Seed of the noise, apart from that of the run, so that runs can be compared."""

    @model_validator(mode="after")
    def _times_differ(self) -> ValidationConfig:
        if len({f"{time:g}" for time in self.times}) < len(self.times):  # as in names of metrics
            raise ValueError("times names a time twice (six digits count)")
        return self


class RunConfig(Strict):
    """Options of one training run."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = "run"
    """Name of the run. A run with the same name and output is continued."""
    output: str = "runs"
    """Folder that holds the runs."""
    store: str | None = None
    """Folder or URL of the store to train on."""
    steps: Positive = 400_000
    """Optimizer steps."""
    global_batch: Positive = 256
    """Samples per step, over all workers."""
    seed: int = 0
    """Seed of initialisation, sample order, noise, timesteps and label drops."""
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.9999
    """Decay of the averaged weights (EMA), from the first step on."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Autocast dtype; 'auto' is bfloat16 on GPUs, float32 on CPUs. float16 is not
    offered, because gradients would underflow without loss scaling."""
    log_every: Positive = 100
    """Steps between rows of the metrics file; each row holds means since the previous one."""
    profile: Annotated[int, Field(ge=1)] | None = None
    """Step at which the first worker profiles two steps (torch profiler). The trace is
    trace-STEP.json in the run's folder, for chrome://tracing or ui.perfetto.dev."""
    wandb: str | None = None
    """Weights & Biases project for the metrics (needs the extra 'wandb')."""
    ray_address: str | None = None
    """Ray cluster to join ('auto' for the one on this node). Default: RAY_ADDRESS, else a private
    local one."""
    student: StudentConfig = StudentConfig()
    diffusion: DiffusionConfig = DiffusionConfig()
    alignment: AlignmentConfig = AlignmentConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    data: DataConfig = DataConfig()
    workers: WorkersConfig = WorkersConfig()
    compute: ComputeConfig = ComputeConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    samples: SamplesConfig = SamplesConfig()
    validation: ValidationConfig = ValidationConfig()

    @model_serializer(mode="wrap")
    def _without_added_defaults(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out tables that have their defaults and are newer than the first release, because
        names on disk are frozen."""
        values: dict[str, Any] = serialize(self)
        for name, default in {"train": TrainConfig(), "validation": ValidationConfig()}.items():
            if getattr(self, name) == default:
                values.pop(name, None)
        return values

    @model_validator(mode="after")
    def _validation_has_samples(self) -> RunConfig:
        validation, holdout = self.validation, self.data.holdout
        end = self.alignment.termination
        if validation.every is not None and not holdout and validation.store is None:
            raise ValueError(
                "validation.every needs samples that are not trained on: set data.holdout, for "
                "example 0.01, or validation.store"
            )
        if validation.store is not None and holdout:
            raise ValueError(
                "validation.store and data.holdout are two places of validation samples: set one"
            )
        if validation.store is not None and validation.every is None:
            raise ValueError("validation.store is read with validation.every only")
        observed = getattr(end, "residual", "alignment")
        if observed == "validation_loss" and validation.every is None:
            raise ValueError(
                "alignment.termination.residual validation_loss needs validation.every"
            )
        return self

    @model_validator(mode="after")
    def _class_options_have_a_token(self) -> RunConfig:
        diffusion, token = self.diffusion, self.student.class_token
        if diffusion.class_stream is not None and token is None:
            raise ValueError("diffusion.class_stream is read with student.class_token only")
        if diffusion.class_weight != CLASS_WEIGHT and token is None:
            raise ValueError(
                "diffusion.class_weight is that of a class token: set student.class_token, or "
                "leave it out"
            )
        return self

    @model_validator(mode="after")
    def _captions_have_a_reader(self) -> RunConfig:
        if self.student.family != "MMDiT":
            if self.diffusion.text_stream is not None:
                raise ValueError(
                    f"diffusion.text_stream is read by an MMDiT, not by {self.student.model}"
                )
            for key in ("captions", "store"):
                if getattr(self.samples, key) is not None:
                    raise ValueError(
                        f"samples.{key} is for an MMDiT; {self.student.model} is conditioned on "
                        "classes"
                    )
            return self
        if self.samples.classes is not None:
            raise ValueError(
                f"samples.classes: {self.student.model} is conditioned on captions: use "
                "samples.captions or samples.store, or leave it out"
            )
        return self

    @model_validator(mode="after")
    def _alignment_fits_student(self) -> RunConfig:
        depth = self.student.size.depth
        for number, stream in enumerate(self.alignment.streams):
            at = place(number)
            if stream.feature_weight and stream.feature_depth > depth:
                raise ValueError(
                    f"{at}.feature_depth {stream.feature_depth} is beyond the student's "
                    f"{depth} blocks"
                )
            if stream.attention_weight and max(stream.student_layers) >= depth:
                raise ValueError(
                    f"{at}.student_layers asks for block {max(stream.student_layers)}; the "
                    f"student has blocks 0 to {depth - 1}"
                )
        if self.student.family == "DiT" and self.diffusion.path != "linear":
            raise ValueError(
                f"diffusion.path {self.diffusion.path} is for SiT; {self.student.model} has a "
                "noise schedule of its own"
            )
        if self.student.family == "DiT" and self.diffusion.time != "uniform":
            raise ValueError(
                f"diffusion.time {self.diffusion.time} is for SiT; {self.student.model} is trained "
                "on uniform timesteps"
            )
        termination = self.alignment.termination
        if self.compute.shard == "fsdp2" and getattr(termination, "kind", "") == "gradient_cosine":
            raise ValueError(
                "alignment.termination.kind gradient_cosine needs gradients of single workers, "
                "which compute.shard fsdp2 does not keep: use another trigger or shard none"
            )
        if self.compute.cuda_graphs and self.workers.count > 1:
            raise ValueError(
                f"compute.cuda_graphs is for one worker, and workers.count is {self.workers.count}"
            )
        if self.global_batch < self.workers.count:
            raise ValueError(
                f"global_batch {self.global_batch} leaves some of {self.workers.count} workers "
                "without a sample"
            )
        return self
