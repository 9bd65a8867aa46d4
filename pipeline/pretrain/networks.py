"""Teacher and autoencoder of one's own images: what ``pipeline.extract`` trains first where it is
asked to (``pretrain``) and their files do not exist yet."""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.cli.progress import progress_bar
from pipeline.datasets import list_images, open_reader
from pipeline.datasets.crop import BadImageError, decode_crop
from pipeline.pretrain.kl_autoencoder import train_autoencoder
from pipeline.pretrain.options import (
    AugmentationConfig,
    AutoencoderConfig,
    BackboneConfig,
    SelfDistillConfig,
)
from pipeline.pretrain.self_distillation import (
    RAW_PIXELS,
    knn_accuracies,
    save_teacher,
    self_distill,
)
from pipeline.storage.files import TEMPORARY, redact
from pipeline.text import counted
from schemas.errors import UserError
from schemas.extract import ExtractConfig, PretrainConfig

logger = logging.getLogger(__name__)

REPORT = "pretrain.json"
"""Name, beside the teacher's weights or in the autoencoder's folder, of the options and results."""
MAX_SCORED = 2000
"""Images that the k-NN accuracy is measured on, which compares each with all others."""
FEWEST = 16
"""Images of a training; fewer ones are repeated, because batch norms need several."""
NEIGHBOURS = 20
BLURRED_DB = 20.0
"""PSNR of decoded images below which objects lose their outlines."""


def train_missing(config: ExtractConfig) -> None:
    """Train the networks of ``config.pretrain`` whose files do not exist, on the images of the
    extraction. Raises ``UserError`` where a file was trained with other options, and for weights
    that are not a path."""
    options = config.pretrain
    assert options is not None
    wanted: dict[Path, tuple[dict[str, Any], Callable[[Path, _Images], dict[str, Any]]]] = {}
    if options.teacher_steps:
        weights = _path(config.teacher.weights, "--teacher.weights", ".safetensors")
        backbone = _backbone(config)
        settings = {"network": backbone.model_dump(), "steps": options.teacher_steps}
        wanted[weights] = (
            settings | _common(config, options) | {"flip": options.flip},
            lambda path, images: _make_teacher(path, images, _teacher_config(config, options)),
        )
    if options.autoencoder_steps:
        settings = {"widths": list(options.widths), "steps": options.autoencoder_steps}
        wanted[_path(config.autoencoder, "--autoencoder", "")] = (
            settings | _common(config, options),
            lambda path, images: _make_autoencoder(path, images, _autoencoder_config(options)),
        )
    images: _Images | None = None
    for path, (settings, make) in wanted.items():
        report = _report_path(path)
        if path.exists():
            _check_report(path, report, settings)
            continue
        images = images or _read_images(config, options)
        results = make(path, images)
        text = json.dumps({"options": settings, "results": results}, indent=1) + "\n"
        report.write_text(text, encoding="utf-8")


class _Images:
    """Decoded images that both networks are trained on."""

    def __init__(self, pixels: Tensor, labels: Tensor) -> None:
        """``pixels`` uint8 (N, 3, R, R), ``labels`` int64 (N,), in random order."""
        # fewer images are all trained on, which uses no labels, and scored against each other
        held_out = min(MAX_SCORED, len(pixels) // 10) if len(pixels) >= 1000 else 0
        self.scored = (pixels[:held_out], labels[:held_out]) if held_out else (pixels, labels)
        self.training, self.all = _repeated(pixels[held_out:]), _repeated(pixels)


def _repeated(pixels: Tensor) -> Tensor:
    """Whole copies of few images, ``FEWEST`` or more."""
    return pixels.repeat(-(-FEWEST // len(pixels)), 1, 1, 1)


def _read_images(config: ExtractConfig, options: PretrainConfig) -> _Images:
    """The first images of the extraction's order, which is random; bad ones are left out. Raises
    ``UserError`` if none is left."""
    items, read = list_images(config).items[: options.images], open_reader(config)
    pixels, labels, bad = [], [], []
    for item in progress_bar(items, unit="image", desc="read images to train on"):
        try:
            pixels.append(decode_crop(read(item), config.resolution, crop=config.crop))
        except (BadImageError, OSError) as error:
            bad.append(f"{item.path} ({error})")
            continue
        labels.append(item.label)
    if bad:  # the extraction reports all of them
        logger.info("trained without %s, first %s", counted(len(bad), "bad image"), bad[0])
    if not pixels:
        raise UserError(
            f"--source '{redact(str(config.source))}': none of {len(items)} files is an image"
        )
    stacked = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)
    return _Images(stacked.contiguous(), torch.tensor(labels))


def _make_teacher(path: Path, images: _Images, config: SelfDistillConfig) -> dict[str, Any]:
    backbone = self_distill(images.training, config, _device())
    pixels, labels = images.scored
    knn: dict[str, float] = {}
    if int(labels.max()) > int(labels.min()) and len(labels) > 1:
        knn = knn_accuracies(backbone, pixels, labels, min(NEIGHBOURS, len(labels) - 1))
    save_teacher(backbone, _temporary(path), config, knn)
    os.replace(_temporary(path), path)
    if knn:
        chance = labels.bincount().max().item() / len(labels)
        values = ", ".join(f"{100 * value:.1f}% by {name}" for name, value in knn.items())
        logger.info(
            "teacher: k-NN accuracy on %d images %s; %.1f%% by guessing the largest class",
            len(labels),
            values,
            100 * chance,
        )
        warn_of_weak_teacher(knn)
        return {"knn": knn, "guessing": chance, "images": len(labels)}
    logger.info("teacher: one class only, so no k-NN accuracy is measured")
    return {"knn": None}


def _make_autoencoder(path: Path, images: _Images, config: AutoencoderConfig) -> dict[str, Any]:
    model, report = train_autoencoder(images.all, config, _device())
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=TEMPORARY, dir=path.parent))
    try:
        model.save_pretrained(folder)
        os.chmod(folder, 0o755)
        os.replace(folder, path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    logger.info("autoencoder: held-out images are decoded at %.1f dB (PSNR)", report.psnr_db)
    warn_of_blur(report.psnr_db)
    return report.model_dump()


def warn_of_weak_teacher(knn: Mapping[str, float]) -> None:
    """Log that a teacher's features tell classes apart no better than pixels do."""
    features = max(value for name, value in knn.items() if name != RAW_PIXELS)
    if features <= knn[RAW_PIXELS]:
        logger.warning(
            "this teacher knows no more of the classes than raw pixels do, so that alignment may "
            "not help: train it longer, or give weights of DINOv2 (--teacher.weights)"
        )


def warn_of_blur(psnr_db: float) -> None:
    """Log that decoded images will lack detail."""
    if psnr_db < BLURRED_DB:
        logger.warning(
            "below %g dB pictures are blurred, whatever the student learns: train the autoencoder "
            "longer, or give another (--autoencoder)",
            BLURRED_DB,
        )


def _backbone(config: ExtractConfig) -> BackboneConfig:
    """The teacher that the extraction creates from its options. Raises ``UserError``."""
    arguments = dict(config.teacher.model_args)
    try:
        return BackboneConfig(
            name=config.teacher.model.partition(".")[0],
            img_size=config.teacher.image_size or config.resolution,
            **arguments,
        )
    except ValueError:
        known = ", ".join(sorted(BackboneConfig.model_fields.keys() - {"name", "img_size"}))
        raise UserError(
            f"pretrain: the keys of --teacher.model-args are {known}, found "
            f"{', '.join(sorted(arguments))}"
        ) from None


def _teacher_config(config: ExtractConfig, options: PretrainConfig) -> SelfDistillConfig:
    backbone, steps = _backbone(config), options.teacher_steps
    large = backbone.embed_dim >= 192
    size = max(backbone.patch_size, backbone.img_size // 2)
    return SelfDistillConfig(
        backbone=backbone,
        augmentation=AugmentationConfig(
            global_area=(0.3, 1.0),
            local_area=(0.1, 0.4),
            local_size=size // backbone.patch_size * backbone.patch_size,
            local_crops=4 if large else 2,
            aspect=1.33,
            degrees=5.0,
            shear=0.05,
            padding="reflection",
            flip=options.flip,
            colour=0.2,
        ),
        prototypes=4096 if large else 512,
        hidden=1024 if large else 384,
        bottleneck=128 if large else 64,
        steps=steps,
        batch_size=options.batch_size,
        learning_rate=5e-4 if large else 1e-3,
        warmup_steps=max(1, steps // 10),
        frozen_last_steps=min(100, steps // 20),
        momentum=0.996 if large else 0.99,
        teacher_temperature=(0.04, 0.07) if large else (0.04, 0.05),
        teacher_temperature_steps=max(1, steps // 4),
        seed=options.seed,
    )


def _autoencoder_config(options: PretrainConfig) -> AutoencoderConfig:
    steps = options.autoencoder_steps
    return AutoencoderConfig(
        widths=options.widths,
        steps=steps,
        batch_size=options.batch_size,
        warmup_steps=max(1, min(50, steps // 10)),
        seed=options.seed,
    )


def _common(config: ExtractConfig, options: PretrainConfig) -> dict[str, Any]:
    source = config.source and redact(config.source)
    common = {"source": source, "resolution": config.resolution, "crop": config.crop}
    return common | options.model_dump(include={"batch_size", "images", "seed"})


def _check_report(path: Path, report: Path, settings: dict[str, Any]) -> None:
    """Raises ``UserError`` where a report tells of other options; a network without a report is the
    user's own."""
    if not report.exists():
        return
    try:
        saved = json.loads(report.read_text(encoding="utf-8"))["options"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"'{report}' cannot be read: remove it and '{path}'") from None
    differing = sorted(k for k in {*saved, *settings} if saved.get(k) != settings.get(k))
    if differing:
        raise UserError(
            f"'{path}' was trained with another {', '.join(differing)}: remove it, the store and "
            "the run made from it, or use other folders"
        )


def _report_path(path: Path) -> Path:
    return path.with_suffix(".json") if path.suffix else path / REPORT


def _path(text: str, option: str, suffix: str) -> Path:
    """Raises ``UserError`` for words such as 'hub' and names of other files."""
    path = Path(text).expanduser()
    if path.suffix != suffix or len(path.parts) < 2:
        kind = f"a path to a {suffix} file" if suffix else "the path of a folder"
        raise UserError(f"pretrain needs {option} to be {kind}, to be written; it is '{text}'")
    return path


def _temporary(path: Path) -> Path:
    return path.with_name(f"{TEMPORARY}{path.name}")


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
