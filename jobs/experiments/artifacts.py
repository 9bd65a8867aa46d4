"""Artifacts that all runs of an experiment share: images, networks trained on them, one store and
the reference statistics.

Each is made once, published atomically, and recorded with the options that made it.
"""

from __future__ import annotations

import io
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
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from jobs.experiments.options import DIGITS
from pipeline.cli.progress import progress_bar
from pipeline.datasets import list_images
from pipeline.datasets.crop import BadImageError, decode_crop
from pipeline.datasets.digits import digits_images, list_digits
from pipeline.datasets.folder import list_class_folders
from pipeline.extract.encoder import Encoder
from pipeline.extract.target_store import missing_tasks, open_store
from pipeline.extract.tasks import stream_name
from pipeline.pretrain.classifier import accuracy, train_classifier
from pipeline.pretrain.kl_autoencoder import train_autoencoder
from pipeline.pretrain.options import AutoencoderConfig, ClassifierConfig, SelfDistillConfig
from pipeline.pretrain.self_distillation import self_distill
from pipeline.storage.files import TEMPORARY
from pipeline.storage.locks import exclusive_lock
from pipeline.store import Store
from pipeline.text import short_value
from schemas.errors import UserError
from schemas.extract import ExtractConfig

logger = logging.getLogger("jobs.experiments")

INFO_FILE = "about.json"
CLASSIFIER_FILE = "judge.safetensors"


class Images(NamedTuple):
    """Images with their classes."""

    pixels: Tensor
    """uint8 (N, 3, R, R)."""
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
                "and the artifacts made from it, or choose another --output"
            )
        return final, report

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Lock the cache for making an artifact and remove the temporary folders of killed
        processes. Raises ``UserError`` if another process has the lock."""
        with exclusive_lock(
            self.folder, what=f"--output '{self.folder}'", remedy="choose another --output"
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


def collect(source: str, held_out: int, resolution: int, folder: Path) -> dict[str, Any]:
    """Copy the images of ``source``, see ``MatrixConfig``, to ``folder/train/CLASS/NAME`` and
    ``folder/held_out/CLASS/NAME``; the last ``held_out`` names of each class are held out. Raises
    ``UserError``."""
    if source == DIGITS:
        return _write_digits(held_out, resolution, folder)
    if Path(source).is_dir():
        by_class: dict[str, list[str]] = {}
        for item in list_class_folders(source).items:
            if item.path.count("/") > 1:
                raise UserError(
                    f"--source '{source}': '{item.path}' is in a folder inside a class; expected "
                    "CLASS/NAME.jpg"
                )
            by_class.setdefault(item.path.split("/")[0], []).append(item.path)
        layout = f"--source '{source}': expected CLASS/NAME.jpg"
        return _split(
            by_class, held_out, folder, lambda name: Path(source, name).read_bytes(), layout
        )
    return unpack(source, held_out, folder)


def unpack(source: str, held_out: int, folder: Path) -> dict[str, Any]:
    """``collect`` of a zip of ``train/CLASS/NAME``."""
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
            layout = f"--source '{source}': expected train/CLASS/NAME.jpg"
            return _split(by_class, held_out, folder, zipped.read, layout)
    except (OSError, zipfile.BadZipFile) as error:
        raise UserError(f"--source '{source}' is not a readable zip: {error}") from None


def _write_digits(held_out: int, resolution: int, folder: Path) -> dict[str, Any]:
    list_digits()  # raises UserError without scikit-learn
    images, labels = digits_images(resolution)
    by_class: dict[str, list[str]] = {}
    for number, label in enumerate(labels.tolist()):
        by_class.setdefault(str(label), []).append(f"{number:04d}.png")

    def encode(name: str) -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(images[int(name.removesuffix(".png"))]).save(buffer, "PNG")
        return buffer.getvalue()

    return _split(by_class, held_out, folder, encode, "--source digits")


def _split(
    by_class: Mapping[str, list[str]],
    held_out: int,
    folder: Path,
    read: Callable[[str], bytes],
    layout: str,
) -> dict[str, Any]:
    """Write both parts of each class; ``layout`` begins the error where one is too small."""
    smallest = min(by_class, key=lambda name: len(by_class[name]), default="none")
    fewest = len(by_class.get(smallest, ()))
    if fewest <= held_out:
        raise UserError(
            f"{layout} with more than {held_out} images of each class; found {len(by_class)} "
            f"classes, the smallest of {fewest} ({short_value(smallest)})"
        )
    for class_name, names in by_class.items():
        if class_name in (".", ".."):
            raise UserError(f"{layout}: it has a class named '{class_name}'")
        splits = {"train": names[:-held_out], "held_out": names[-held_out:]}
        for split, members in splits.items():
            target = folder / split / class_name
            target.mkdir(parents=True)
            for name in members:
                (target / Path(name).name).write_bytes(read(name))
    return {"classes": len(by_class), "images": sum(map(len, by_class.values()))}


def read_images(folder: Path, resolution: int) -> Images:
    """All images of ``folder/CLASS``, with the labels of their store. Raises ``UserError`` if one
    is damaged, and for a class without images."""
    listing = list_class_folders(str(folder))
    pixels = []
    for item in listing.items:
        path = folder / item.path
        try:
            pixels.append(decode_crop(path.read_bytes(), resolution))
        except (OSError, BadImageError) as error:
            raise UserError(f"'{path}' cannot be used: {error}") from None
    stacked = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous()
    return Images(stacked, torch.tensor([item.label for item in listing.items]))


def make_teacher(
    folder: Path, train: Images, config: SelfDistillConfig, device: str
) -> dict[str, Any]:
    """Self-distil the teacher, without labels."""
    backbone = self_distill(train.pixels, config, device)
    save_file(backbone.state_dict(), folder / "teacher.safetensors")
    return {}


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
