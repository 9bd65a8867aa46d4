"""The options of ``jobs/evaluate.py``, and what it finds."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from schemas.base import Strict
from schemas.extract import Resolution
from schemas.fields import MAX_TEXT, Digest, ModelArguments, ModelId, Seed
from schemas.sample import Sampling, Weights


class EvaluateConfig(Strict):
    """Which images are compared, and by which networks."""

    samples: str | None = None
    """Generated images: an .npz (arr_0, uint8 (N, H, W, 3)), a folder of pictures or a store."""
    reference: str | None = None
    """Real images: the same, or an .npz of statistics (ADM's, or of --save-reference). One with
    both, such as ADM's reference batches, gives fid and sfid by its statistics as ADM's evaluator
    does, and all else by its images, which may be fewer than the statistics are of."""
    save_reference: str | None = None
    """Write the reference's statistics to this .npz; without --samples nothing else is done."""
    inception_weights: str | None = None
    """The Inception network's weights: a file as of torch-fidelity or pytorch-fid, or 'hub'
    (default: fetched once to torch's cache)."""
    network: ModelId | None = None
    """A timm network in place of Inception; sfid and inception_score are then null."""
    network_weights: str | None = None
    """Its weights: FILE (a classifier's, too), 'hub' or 'random' (of --seed)."""
    network_size: Annotated[int, Field(ge=8, le=2048)] | None = None
    """Pixels per side of what it sees. Default: its own."""
    network_args: ModelArguments = Field(default={})
    """Arguments of timm.create_model, such as --network-args.num_heads 3."""
    dinov2: ModelId = "vit_large_patch14_dinov2.lvd142m"
    """The network of fd_dinov2."""
    dinov2_weights: str | None = None
    """Its weights: FILE, 'hub' or none (fd_dinov2 is then null)."""
    dinov2_size: Annotated[int, Field(ge=8, le=2048)] = 224
    """Pixels per side of what it sees; published distances are at 224."""
    k: Annotated[int, Field(ge=1, le=1000)] = 3
    """Neighbours that precision's and recall's balls reach to."""
    manifold_images: Annotated[int, Field(ge=2, le=1 << 20)] = 50_000
    """Of larger sets so many evenly spread images give precision and recall; their features are
    kept in $TMPDIR, and in the file of --save-reference."""
    max_images: Annotated[int, Field(ge=2)] | None = None
    """Take the first so many images of each set, for a quick look."""
    resolution: Resolution | None = None
    """Folders only: cut centre squares of so many pixels out of pictures, as ADM does. Without it
    pictures must be of one size."""
    autoencoder: str | None = None
    """Decoder of a store that has no crops: hub id or folder. Default: the one that encoded it."""
    record: str | None = None
    """Folder or URL of the training run that the samples are of: a row is added to its
    evaluations.jsonl. Samples that say that they are of other weights than the run's checkpoint of
    their step or, where it is gone, of another run's folder, are refused."""
    step: Annotated[int, Field(ge=0)] | None = None
    """Of that run, where the samples do not say."""
    weights: Literal["ema", "model"] | None = None
    """Which weights of the run drew the samples, where these do not say. Default: ema."""
    batch_size: Annotated[int, Field(ge=1, le=1 << 16)] = 64
    """Images at a time."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute."""
    seed: Seed = 0
    """Of random weights."""
    as_json: Annotated[bool, Field(alias="json")] = False
    """Print the numbers as one JSON object."""


class NetworkIdentity(Strict):
    """What must agree for features to be of the same network."""

    size: int
    """Pixels per side of what it sees."""
    weights_sha256: Digest
    arguments: Annotated[str, Field(max_length=MAX_TEXT)] = ""
    """Of timm.create_model, as JSON, or a digest of very many; empty where there are none."""


class Evaluation(Strict):
    """What ``--json`` prints."""

    fid: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    """Fréchet distance on the network's features."""
    sfid: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None
    """The same on Inception's spatial features."""
    inception_score: Annotated[float, Field(allow_inf_nan=False)] | None
    precision: Annotated[float, Field(ge=0, le=1)] | None
    """Null only of a reference that consists of moments."""
    recall: Annotated[float, Field(ge=0, le=1)] | None
    fd_dinov2: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None
    samples: int
    """Generated images."""
    network: str
    """That fid, precision and recall are of."""


class RecordedEvaluation(Evaluation):
    """A row of a run's evaluations.jsonl. Earlier versions wrote rows without the fields that have
    a default here: of those it is not known."""

    step: Annotated[int, Field(ge=0)]
    weights: Weights
    weights_sha256: Digest | None = None
    """Of the student's."""
    network_identity: NetworkIdentity | None = None
    reference: str
    """Path or URL, for people."""
    reference_sha256: Digest | None = None
    """Of the mean and covariance of the network's features: the same wherever they lie. Computed
    anew from images, with another batch size or device, they differ in the last digits."""
    decoder: str | None = None
    """Name of the autoencoder that decoded the samples, for people."""
    sampling: Sampling | None = None
    """Null of samples that do not say how they were drawn."""
