"""Options of ``python -m pipeline.extract``."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from schemas.base import Strict
from schemas.codecs import CodecName, CodecOptions
from schemas.fields import ModelArguments, ModelId, Name, Seed, StoredLayers, StreamName

Precision = Literal["float32", "bfloat16", "float16"]
Cut = Literal["maps", "qk", "activations", "image"]
Format = Literal["webdataset", "zarr"]
Dataset = Literal["imagenet", "folder", "webdataset", "repa", "coco", "coco256_features", "demo"]
Split = Literal["train", "val"]
"""Split of MS-COCO 2014."""
Crop = Literal["adm", "square_lanczos"]
"""Way to cut a square out of an image: see ``ExtractConfig.crop``."""
Resolution = Annotated[int, Field(ge=16, le=4096)]
"""Pixels per side of a crop."""
TeacherSize = Annotated[int, Field(ge=1, le=1 << 13)]
"""Pixels per side of the teacher's input."""
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


Resize = Literal["bicubic", "bicubic_antialias", "bilinear", "bilinear_antialias"]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
ClassTokenOption = Literal["class", "mean", "none"]
PositiveShare = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]


def _no_layers(value: Any) -> Any:
    return () if value in ("none", None, ["none"], ("none",)) else value


ExtractedLayers = Annotated[StoredLayers, BeforeValidator(_no_layers)]
"""Teacher layers to extract; 'none' for none of them."""


class TeacherConfig(Strict):
    """The frozen vision transformer."""

    model: ModelId = "vit_base_patch14_dinov2.lvd142m"
    """Any timm id of a vision transformer: DINOv2, DINOv3, CLIP, MAE, SigLIP, ... (Use
    the quickgelu variants of OpenAI's CLIP, which was trained with that activation.)"""
    weights: str = "hub"
    """'hub' (timm's own download), a path to a .pth, .pt or .safetensors file with the names of the
    authors, timm or Transformers, also within the checkpoint of a training (teacher.backbone.,
    module., ...), 'demo' (included in the project), or 'random' (seeded, with layer scales and
    logits as large as a trained model's; for tests)."""
    seed: Seed = 0
    """Seed of weights 'random'."""
    image_size: TeacherSize | None = None
    """Pixels per side of the teacher's input. Default: the size that gives one token per 16 pixels
    of the crop, the student's grid (224 for patch 14 at resolution 256)."""
    mean: tuple[Share, Share, Share] | None = None
    """Mean of red, green and blue, from 0 to 1, that the teacher's input is normalised by, for
    instance 0.485,0.456,0.406. Default: that of the model's name in timm, whatever file the weights
    are from."""
    std: tuple[PositiveShare, PositiveShare, PositiveShare] | None = None
    """Standard deviation, likewise, for instance 0.229,0.224,0.225."""
    resize: Resize = "bicubic"
    """Interpolation from the crop to the teacher's input, after the normalisation; without
    antialiasing as in REPA and HASTE."""
    model_args: ModelArguments = Field(default={})
    """Extra arguments of timm.create_model, for instance --teacher.model-args.depth 6."""


class TextConfig(Strict):
    """Text encoder of captions."""

    keep: Literal["embeddings", "tokens", "none"] | None = None
    """Stored form of captions: 'embeddings' (the encoder's last hidden state), 'tokens' (ids, and
    the trainer runs the encoder) or 'none'. Default: embeddings where the data set has captions."""
    encoder: str = "openai/clip-vit-large-patch14"
    """Hub id or folder of an encoder of Transformers: CLIP, T5, BERT, ... It runs in float32."""
    weights: str = "hub"
    """'hub' (the encoder's place, also where that is a folder), a .safetensors, .pth or .pt file
    with the names of Transformers, OpenAI's CLIP or open_clip, alone or within a larger model, or
    'random' (seeded, for tests)."""
    seed: Seed = 0
    """Seed of weights 'random'."""
    model_args: ModelArguments = Field(default={})
    """Keys of the encoder's config that differ, for instance --text.model-args.num-hidden-layers 2.
    They are of use with weights of a file or 'random'."""
    tokenizer: str | None = None
    """Hub id or folder of the tokenizer, or 'open_clip' (CLIP's vocabulary, which the package
    open_clip_torch contains). Default: the encoder's place; for OpenAI's CLIP the vocabulary of
    open_clip_torch if that is installed, which gives the same ids."""
    max_tokens: Annotated[int, Field(ge=2, le=4096)] | None = None
    """Tokens of a caption; longer ones are truncated and shorter ones padded, as the tokenizer
    does. Default: the encoder's positions (CLIP 77), or 77 where it has no limit (T5)."""
    codec: CodecName = "rms32"
    """Codec of embeddings. 'rms32' has a cosine of 0.9999 or more for each token, in less than a
    quarter of float32's bytes."""


class PretrainConfig(Strict):
    """Training of a small teacher and autoencoder on the images themselves, before the extraction,
    where the files that --teacher.weights and --autoencoder name do not exist yet."""

    teacher_steps: Annotated[int, Field(ge=0)] = 600
    """Steps of the teacher's self-distillation (DINO) into the file --teacher.weights; 0: it is not
    trained."""
    autoencoder_steps: Annotated[int, Field(ge=0)] = 800
    """Steps of the autoencoder's training into the folder --autoencoder; 0: it is not trained."""
    widths: tuple[Annotated[int, Field(ge=1)], ...] = (16, 32)
    """Channels of the autoencoder's levels, multiples of 8; every level after the first halves the
    resolution."""
    batch_size: Annotated[int, Field(ge=2)] = 64
    """Images per step."""
    images: Annotated[int, Field(ge=1)] = 20000
    """Images that are trained and measured on, at most: they are held in memory."""
    flip: bool = True
    """Mirror half of the teacher's crops; not for digits and letters."""
    seed: Seed = 0
    """Seed of both trainings."""


class ExtractConfig(Strict):
    """Options of one extraction."""

    dataset: Dataset = "imagenet"
    """Kind of image source: 'imagenet' (train/WNID/*.JPEG or Kaggle's
    ILSVRC/Data/CLS-LOC/train), 'folder' (any tree with one folder per class), 'webdataset' (tars of
    jpg + cls, not compressed, as stock webdataset reads them), 'repa' (ImageNet as REPA's and
    HASTE's dataset_tools.py prepares it: images/ and vae-sd/ with dataset.json; their latents are
    used and no autoencoder is run), 'coco' (MS-COCO 2014: train2014/, val2014/, annotations/),
    'coco256_features' (MS-COCO as U-ViT's and HASTE's scripts prepare it: latents and embeddings of
    captions are used, no autoencoder or text encoder is run), 'demo' (scikit-learn's digits,
    included in its package)."""
    source: str | None = None
    """Folder or URL of the images. With --dataset webdataset also one tar, or a quoted pattern of
    tars: 's3://bucket/{000..146}.tar', 'data/train-*.tar'."""
    store: str | None = None
    """Folder or fsspec URL of the store to make or complete."""
    synsets: str | None = None
    """ImageNet only: a file of WNIDs, one per line, each once, such as LOC_synset_mapping.txt. The
    class number is the position in this list, counted from 0, even if the source lacks some of its
    classes. Default: the rank of the class folder. With 'webdataset' and 'repa', whose classes are
    numbered, the list names them."""
    allow_empty_classes: bool = False
    """Keep class folders without images, and classes whose every image was skipped as bad, as
    classes without images. By default they are errors, because the numbers of later classes depend
    on them."""
    unlabelled: bool = False
    """With 'folder': every image below the source, in whatever folder, is of one class, which has
    the source's name."""
    split: Split | None = None
    """MS-COCO only: 'train' (the default) or 'val'. A store has one split."""
    captions: str | None = None
    """Captions beside the images. With 'folder' a file of JSON lines, {"file": path below the
    source, "captions": [text, ...]}: folders are not classes then. With 'webdataset' the members to
    read, 'txt' or 'json' (key caption or captions); by default tars without .cls have captions, in
    .txt, else in .json."""
    resolution: Resolution = 256
    """Pixels per side of the centre crop."""
    crop: Crop = "adm"
    """Crop: 'adm' (halved, the short side resized bicubically, then the centre cut out, as HASTE,
    REPA and SiT prepare ImageNet) or 'square_lanczos' (the centre square cut out, then resized with
    Lanczos, as U-ViT, REPA and HASTE prepare MS-COCO; the default of 'coco')."""
    teacher: TeacherConfig = TeacherConfig()
    text: TextConfig = TextConfig()
    autoencoder: str = "stabilityai/sd-vae-ft-mse"
    """Hub id or folder of a diffusers autoencoder of images (AutoencoderKL, AutoencoderTiny,
    AutoencoderDC, AutoencoderKLFlux2, AutoencoderKLQwenImage, ...), or 'demo' (included in the
    project). Its normalisation of latents is written into the manifest. With --dataset repa: the
    one that made the latents."""
    pretrain: PretrainConfig | None = None
    cut: Cut = "maps"
    """Point at which the teacher's forward pass is cut: 'maps' stores attention probabilities and
    features; 'qk' the queries and keys, and features; 'activations' the tokens that enter the first
    of --layers, and training runs the following blocks; 'image' stores the crop, and training runs
    the whole teacher (the online baseline)."""
    layers: ExtractedLayers = (7, 8, 9, 10, 11)
    """Teacher layers whose attention is stored, 0-based. 7-11 covers the layer maps of the
    paper. 'none' stores features alone, with the cuts 'maps' and 'image': also of teachers whose
    attention cannot be read (BEiT, SAM, NaFlex, relative position bias, ...)."""
    class_token: ClassTokenOption = "class"
    """Vector of the teacher, after the final norm, that a stream 'class' holds beside the cut:
    recipes with a class token, as REG, read it at every step (1.5 KB per image of DINOv2-B).
    'class' is the class token (no such stream is written for a teacher without one), 'mean' the
    mean of the patch tokens, 'none' saves the blocks after the cuts 'activations' and 'image',
    which the extraction runs for it."""
    codec: CodecOptions = CodecOptions()
    column_codecs: dict[Name, CodecName] = Field(default={})
    """Codecs of single tensors, for instance --column-codecs.features float16 or
    --column-codecs.tokens tokens28."""
    compress: bool = True
    """Compress losslessly where that saves space; 'false' is faster to read and larger."""
    format: Format = "webdataset"
    """Format of a shard: a tar per stream, which stock webdataset opens, or a zarr v3 shard per
    array."""
    add_stream: StreamName | None = None
    """Name of a teacher stream to add to an existing store: another teacher, cut, codec or other
    layers. Latents, keys and shards do not change. Data set, source, teacher and layers default to
    the store's, all other options to the defaults of its data set. 'class', or the name of a
    teacher stream with '_class' behind it, computes that teacher's class tokens from the store
    itself, without images and teacher. A name that is 'text' or begins with 'text_' adds captions
    (--text.*)."""
    shard_size: Annotated[int, Field(ge=1, le=1 << 20)] = 64
    """Samples per shard."""
    batch_size: Annotated[int, Field(ge=1)] = 32
    """Images per forward pass."""
    precision: Literal["auto"] | Precision = "auto"
    """Arithmetic of teacher and autoencoder; 'auto' is bfloat16 on GPUs, float32 on CPUs."""
    actors: Annotated[int, Field(ge=1)] | None = None
    """Encoder actors. Default: one per GPU of the cluster, or one per CPU where it has no GPU."""
    cpus_per_actor: Annotated[int, Field(ge=1)] | None = None
    """CPUs of one actor: its decoding threads, and on CPU its arithmetic threads. Default: 1 on
    CPU; with GPUs an equal share of the CPUs, at most 8."""
    gpus_per_actor: Annotated[float, Field(ge=0)] | None = None
    """GPUs of one actor. Default: 1 where the cluster has GPUs, else 0."""
    on_bad_image: Literal["stop", "skip"] = "stop"
    """Handling of files that are not images or cannot be read: 'stop' reports them and does not
    commit their shard; 'skip' leaves them out and lists them in the manifest."""
    order_seed: int = 0
    """Seed of the permutation that spreads the classes over the shards."""
    max_attempts: Annotated[int, Field(ge=1)] = 3
    """Maximum number of attempts at a shard whose actor dies."""
    ray_address: str | None = None
    """Ray cluster to join ('auto' for the one on this node). Default: RAY_ADDRESS, else a private
    local one."""

    @model_validator(mode="after")
    def _cuts_without_attention(self) -> ExtractConfig:
        if not self.layers and self.cut in {"activations", "qk"}:
            raise ValueError(
                f"layers none: cut '{self.cut}' is defined by them; use --cut maps, which stores "
                "features alone then, or --cut image"
            )
        return self


PRESETS: dict[str, dict[str, Any]] = {
    # Tokens entering block 7 serve every layer map of the paper for 0.2 MB per image; the maps of
    # those layers would be 17 times as much, for saving 5 of 12 teacher blocks (3% of an SiT-XL/2
    # step).
    "imagenet": {"cut": "activations"},
    "coco": {"cut": "activations", "crop": "square_lanczos"},
    "coco256_features": {"cut": "activations"},
    # Digits are 8 x 8 pixels drawn at 32; the demo teacher sees them as 8 x 8 tokens.
    "demo": {
        "cut": "maps",
        "resolution": 32,
        "teacher": {
            "model": "vit_small_patch14_dinov2.lvd142m",
            "weights": "demo",
            "image_size": 32,
            "model_args": {"patch_size": 4, "embed_dim": 96, "depth": 6, "num_heads": 6},
        },
        "autoencoder": "demo",
        "layers": (2, 3, 4, 5),
        "codec": {"calibration": 64},
        "shard_size": 128,
    },
}
"""Defaults of options by data set."""
