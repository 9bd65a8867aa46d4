"""Options and results of ``jobs/evaluate.py``."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from schemas.base import Strict
from schemas.extract import Resolution
from schemas.fields import MAX_TEXT, Digest, ModelArguments, ModelId, Seed, is_none
from schemas.sample import Sampling, Weights

Resizing = Literal["tensorflow", "pytorch"]


class EvaluateConfig(Strict):
    """The images to compare, and the networks that compare them."""

    samples: str | None = None
    """Generated images: an .npz (arr_0, uint8 (N, H, W, 3)), a folder of images or a store."""
    reference: str | None = None
    """Real images: the same, or an .npz of statistics (ADM's, or of --save-reference). If it holds
    both, as ADM's reference batches do, fid and sfid use its statistics as ADM's evaluator does,
    and the other metrics its images, which may be fewer."""
    save_reference: str | None = None
    """Write the statistics of the reference to this .npz; --samples is then optional."""
    inception_weights: str | None = None
    """Weights of the Inception network: a file of torch-fidelity or pytorch-fid, or 'hub' (default:
    downloaded once to torch's cache)."""
    inception_resizing: Resizing | Literal["both"] = "tensorflow"
    """Resizing of images to Inception's 299 pixels: 'tensorflow', as in ADM's evaluator and
    torch-fidelity, or 'pytorch', as in pytorch-fid and the MS-COCO numbers of U-ViT, REPA and
    HASTE; 'both' adds fid_pytorch to the numbers of 'tensorflow'. The statistics of a file that
    does not say it count as those of this option."""
    network: ModelId | None = None
    """A timm network instead of Inception; sfid and inception_score are then null."""
    network_weights: str | None = None
    """Weights of --network: FILE (a classifier is accepted), 'hub' or 'random' (from --seed)."""
    network_size: Annotated[int, Field(ge=8, le=2048)] | None = None
    """Pixels per side of the input of --network. Default: its own."""
    network_args: ModelArguments = Field(default={})
    """Arguments of timm.create_model, such as --network-args.num_heads 3."""
    dinov2: ModelId = "vit_large_patch14_dinov2.lvd142m"
    """The network of fd_dinov2."""
    dinov2_weights: str | None = None
    """Weights of --dinov2: FILE, 'hub' or none (fd_dinov2 is then null)."""
    dinov2_size: Annotated[int, Field(ge=8, le=2048)] = 224
    """Pixels per side of the input of --dinov2; published distances are at 224."""
    clip: str = "openai/clip-vit-large-patch14"
    """The network of clip_score: hub id or folder of a CLIP of Transformers."""
    clip_weights: str | None = None
    """Weights of --clip: FILE (names of Transformers, OpenAI's CLIP or open_clip), 'hub', 'random'
    or none (no clip_score). The samples need captions, as jobs/sample.py records them."""
    k: Annotated[int, Field(ge=1, le=1000)] = 3
    """k of the k-nearest-neighbour radius of precision and recall."""
    manifold_images: Annotated[int, Field(ge=2, le=1 << 20)] = 50_000
    """Maximum number of images for precision and recall; a larger set is subsampled evenly. Their
    features are stored in $TMPDIR, and in the file of --save-reference."""
    max_images: Annotated[int, Field(ge=2)] | None = None
    """Use only the first images of each set, up to this number, for a quick test."""
    resolution: Resolution | None = None
    """Folders only: pixels per side of the centre crop, made as ADM does. Without it all images
    must have the same size."""
    autoencoder: str | None = None
    """Decoder of a store that has no crops: hub id or folder. Default: the one that encoded it."""
    record: str | None = None
    """Folder or URL of the training run that made the samples: a row is added to its
    evaluations.jsonl. Samples of other weights than the run's checkpoint at the same step are
    refused. If that checkpoint was deleted, the samples' metadata must name this run's folder."""
    step: Annotated[int, Field(ge=0)] | None = None
    """Training step of the samples, where their metadata do not name it."""
    weights: Literal["ema", "model"] | None = None
    """Weights that made the samples, where their metadata do not name them. Default: ema."""
    batch_size: Annotated[int, Field(ge=1, le=1 << 16)] = 64
    """Images per forward pass."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device of the networks; 'auto' is the GPU if there is one."""
    seed: Seed = 0
    """Seed of random weights."""
    as_json: Annotated[bool, Field(alias="json")] = False
    """Print the results as one JSON object."""


class NetworkIdentity(Strict):
    """Properties that are equal if features come from the same network."""

    size: int
    """Pixels per side of its input."""
    resizing: Resizing = Field(default="tensorflow", exclude_if=lambda one: one == "tensorflow")
    """Resizing of Inception's input."""
    weights_sha256: Digest
    arguments: Annotated[str, Field(max_length=MAX_TEXT)] = ""
    """Arguments of timm.create_model as JSON, a digest if they are long, empty if none."""


class Evaluation(Strict):
    """The object that ``--json`` prints."""

    fid: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    """Fréchet distance on the network's features."""
    fid_pytorch: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = Field(
        default=None, exclude_if=is_none
    )
    """The same of Inception with PyTorch's resizing, with --inception-resizing both."""
    inception_resizing: Resizing | None = Field(default=None, exclude_if=is_none)
    """Resizing of fid, of Inception only; not in rows of earlier versions, where it is
    'tensorflow'."""
    sfid: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None
    """Fréchet distance on Inception's spatial features."""
    inception_score: Annotated[float, Field(allow_inf_nan=False)] | None
    """Mean over ten splits of the samples, which are shuffled by a fixed seed."""
    precision: Annotated[float, Field(ge=0, le=1)] | None
    """Null only if the reference consists of moments."""
    recall: Annotated[float, Field(ge=0, le=1)] | None
    fd_dinov2: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None
    clip_score: Annotated[float, Field(ge=0, le=100)] | None = Field(
        default=None, exclude_if=is_none
    )
    """Mean of 100 cos(image, caption) over the samples, with --clip-weights."""
    clip: str | None = Field(default=None, exclude_if=is_none)
    """Network of clip_score, with the beginning of its weights' SHA-256."""
    samples: int
    """Generated images."""
    network: str
    """Network of fid, precision and recall."""


class RecordedEvaluation(Evaluation):
    """A row of a run's evaluations.jsonl. Rows of earlier versions lack the fields that have a
    default: their values are unknown."""

    step: Annotated[int, Field(ge=0)]
    weights: Weights
    weights_sha256: Digest | None = None
    """Beginning of the SHA-256 of the student's weights."""
    network_identity: NetworkIdentity | None = None
    reference: str
    """Path or URL, for display."""
    reference_sha256: Digest | None = None
    """Beginning of the SHA-256 of the mean and covariance of the network's features. It does not
    depend on the path; it does on batch size and device, which change the last digits."""
    decoder: str | None = None
    """Name of the autoencoder that decoded the samples, for display."""
    sampling: Sampling | None = None
    """Null if the samples have no metadata on how they were generated."""
