"""Artifacts that all runs of an experiment share: images, networks trained on them, one store and
the reference statistics.

Each is made once, published atomically, and recorded with the options that made it.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from pipeline.cli.progress import progress_bar
from pipeline.datasets import list_images
from pipeline.datasets.crop import BadImageError, decode_crop
from pipeline.datasets.folder import list_class_folders
from pipeline.evaluate.evaluator import evaluate
from pipeline.evaluate.features.factory import open_network
from pipeline.evaluate.reference_statistics import load_moments, moments_digest
from pipeline.extract.encoder import Encoder
from pipeline.extract.target_store import missing_tasks, open_store
from pipeline.extract.tasks import stream_name
from pipeline.pretrain.classifier import accuracy, train_classifier
from pipeline.pretrain.kl_autoencoder import train_autoencoder
from pipeline.pretrain.options import AutoencoderConfig, ClassifierConfig, SelfDistillConfig
from pipeline.pretrain.self_distillation import knn_accuracies, self_distill
from pipeline.storage.files import TEMPORARY
from pipeline.storage.locks import exclusive_lock
from pipeline.storage.npz import Archive
from pipeline.store import Store
from pipeline.text import short_value
from schemas.errors import UserError
from schemas.evaluate import EvaluateConfig
from schemas.extract import ExtractConfig

logger = logging.getLogger("jobs.experiments")

RESOLUTION = 32  # of CIFAR-10, pixels per side
EVALUATION_SEED = 0
INFO_FILE = "about.json"
CLASSIFIER_FILE = "judge.safetensors"
REFERENCE_FILE = "reference.npz"


class Images(NamedTuple):
    """Images of CIFAR-10 with their classes."""

    pixels: Tensor
    """uint8 (N, 3, 32, 32)."""
    labels: Tensor
    """int64 (N,)."""


class ArtifactCache:
    """Finished artifacts below one folder, each in its own folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def get(
        self, name: str, options: Mapping[str, Any], make: Callable[[Path], dict[str, Any]]
    ) -> tuple[Path, dict[str, Any]]:
        """The folder of an artifact and the report of ``make``, which fills an empty folder and is
        called only if the artifact is missing. Raises ``UserError`` if it was made with other
        options."""
        final = self.folder / name
        requested = json.loads(json.dumps(options))
        if not final.exists():
            with self.exclusive():
                if not final.exists():  # another process may have made it in the meantime
                    self._make(name, requested, make)
        try:
            info = json.loads((final / INFO_FILE).read_text())
            saved, report = info["options"], info["report"]
        except (OSError, ValueError, KeyError, TypeError):
            raise UserError(f"'{final / INFO_FILE}' cannot be read: remove '{final}'") from None
        if saved != requested:
            differing = sorted(
                key for key in {*saved, *requested} if saved.get(key) != requested.get(key)
            )
            raise UserError(
                f"the {name} in '{final}' was made with another {', '.join(differing)}: remove it "
                "and the artifacts made from it, or choose another --work"
            )
        return final, report

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Lock the cache for making an artifact and remove the temporary folders of killed
        processes. Raises ``UserError`` if another process has the lock."""
        with exclusive_lock(
            self.folder, what=f"--work '{self.folder}'", remedy="choose another --work"
        ):
            for path in self.folder.glob(f"{TEMPORARY}*"):
                if path.is_dir():
                    shutil.rmtree(path)
            yield

    def _make(
        self, name: str, options: Mapping[str, Any], make: Callable[[Path], dict[str, Any]]
    ) -> None:
        temporary = Path(tempfile.mkdtemp(prefix=TEMPORARY, dir=self.folder))
        try:
            logger.info("making artifact '%s'", name)
            info = {"options": options, "report": make(temporary)}
            (temporary / INFO_FILE).write_text(json.dumps(info, indent=1) + "\n")
            os.replace(temporary, self.folder / name)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def unpack(source: str, held_out: int, folder: Path) -> dict[str, Any]:
    """Unpack ``train/CLASS/NAME`` of the zip to ``folder/train`` and ``folder/held_out``; the last
    ``held_out`` names of each class are held out. Raises ``UserError``."""
    try:
        with zipfile.ZipFile(source) as zipped:
            by_class: dict[str, list[str]] = {}
            for name in sorted(zipped.namelist()):
                parts = name.split("/")
                if len(parts) < 3 or parts[0] != "train" or parts[1].startswith("."):
                    continue
                images = by_class.setdefault(parts[1], [])  # of an entry of a folder, too
                if parts[2].startswith("."):
                    continue
                if len(parts) > 3:
                    raise UserError(
                        f"--source '{source}': '{name}' is in a folder inside a class; expected "
                        "train/CLASS/NAME.jpg"
                    )
                if parts[2]:
                    images.append(name)
            smallest = min(by_class, key=lambda name: len(by_class[name]), default="none")
            fewest = len(by_class.get(smallest, ()))
            if fewest <= held_out:
                raise UserError(
                    f"--source '{source}': expected train/CLASS/NAME.jpg with more than {held_out} "
                    f"images of each class; found {len(by_class)} classes, the smallest of "
                    f"{fewest} ({short_value(smallest)})"
                )
            for class_name, names in by_class.items():
                if class_name in (".", ".."):
                    raise UserError(f"--source '{source}' has a class named '{class_name}'")
                splits = {"train": names[:-held_out], "held_out": names[-held_out:]}
                for split, members in splits.items():
                    target = folder / split / class_name
                    target.mkdir(parents=True)
                    for name in members:
                        (target / Path(name).name).write_bytes(zipped.read(name))
    except (OSError, zipfile.BadZipFile) as error:
        raise UserError(f"--source '{source}' is not a readable zip: {error}") from None
    return {"classes": len(by_class), "images": sum(map(len, by_class.values()))}


def read_images(folder: Path) -> Images:
    """All images of ``folder/CLASS``, with the labels of their store. Raises ``UserError`` if one
    is damaged, and for a class without images."""
    listing = list_class_folders(str(folder))
    pixels = []
    for item in listing.items:
        path = folder / item.path
        try:
            pixels.append(decode_crop(path.read_bytes(), RESOLUTION))
        except (OSError, BadImageError) as error:
            raise UserError(f"'{path}' cannot be used: {error}") from None
    stacked = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous()
    return Images(stacked, torch.tensor([item.label for item in listing.items]))


def make_teacher(
    folder: Path, train: Images, held_out: Images, config: SelfDistillConfig, device: str
) -> dict[str, Any]:
    """Self-distil the teacher; labels are used only for its accuracy on held-out images."""
    backbone = self_distill(train.pixels, config, device)
    save_file(backbone.state_dict(), folder / "teacher.safetensors")
    return {"knn_held_out": knn_accuracies(backbone, held_out.pixels, held_out.labels)}


def make_autoencoder(
    folder: Path, train: Images, config: AutoencoderConfig, device: str
) -> dict[str, Any]:
    """Train the autoencoder; ``folder`` gets diffusers' format."""
    model, report = train_autoencoder(train.pixels, config, device)
    model.save_pretrained(folder)
    return report.model_dump()


def make_classifier(
    folder: Path, train: Images, held_out: Images, config: ClassifierConfig, device: str
) -> dict[str, Any]:
    """Train the evaluation classifier, whose features the Fréchet distance compares."""
    model = train_classifier(train.pixels, train.labels, config, device)
    save_file(model.state_dict(), folder / CLASSIFIER_FILE)
    return {"held_out_accuracy": accuracy(model, held_out.pixels, held_out.labels)}


def complete_store(cache: ArtifactCache, config: ExtractConfig, device: str, threads: int) -> Store:
    """Extract the missing shards as ``python -m pipeline.extract`` does, in this process, without
    Ray. Raises ``UserError`` if the store was made with other options or networks, or if another
    process makes an artifact."""
    assert config.store is not None
    listing, name = list_images(config), stream_name(config)
    encoder = Encoder(config, device=device, threads=threads)
    existing = Store.open(config.store) if Store.exists(config.store) else None
    if existing is not None and existing.has_index() and not existing.missing_shards(name):
        return open_store(config, listing, existing, encoder)
    with cache.exclusive():
        store = open_store(config, listing, existing, encoder)
        tasks = missing_tasks(config, listing, store)
        for task in progress_bar(tasks, unit="shard", desc="extract"):
            result = encoder.encode_shard(store.url, store.manifest, task)
            if result.bad_images:
                bad = result.bad_images[0]
                raise UserError(f"bad image {bad.path}: {bad.error}")
        store.finish()
    return store


def evaluation_network(classifier: Path, config: ClassifierConfig) -> dict[str, Any]:
    """Options that select the classifier's features, the same for training and evaluation."""
    return {
        "network": config.name,
        "network_weights": str(classifier / CLASSIFIER_FILE),
        "network_size": RESOLUTION,
    }


def make_reference(
    folder: Path, train: Path, held_out: Path, network: Mapping[str, Any], images: int, device: str
) -> dict[str, Any]:
    """Statistics of the training images, and the distance of ``images`` held-out ones to them,
    which is what a perfect model would reach with as many samples."""
    path = str(folder / REFERENCE_FILE)
    common = {"reference": str(train), "resolution": RESOLUTION, "batch_size": 500, **network}
    evaluate(EvaluateConfig.model_validate({**common, "save_reference": path}), device)
    floor = {**common, "reference": path, "samples": str(held_out), "max_images": images}
    result = evaluate(EvaluateConfig.model_validate(floor), device)
    assert result is not None
    return {"held_out_fid": result.fid, "samples": result.samples}


def digest_of_reference(folder: Path, network: Mapping[str, Any]) -> str:
    """The digest by which rows of evaluations identify the reference, independent of its path.
    Raises ``UserError``."""
    path = str(folder / REFERENCE_FILE)
    options = EvaluateConfig.model_validate({"reference": path, **network})
    return moments_digest(
        load_moments(Archive(path, "reference"), open_network(options, device="cpu"))
    )
