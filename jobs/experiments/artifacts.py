"""What all runs of an experiment share: images, networks trained on them, one store, a reference.

Each is made once, written whole or not at all, and remembers the options that made it.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from pydantic import BaseModel
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from jobs.pretrain.autoencoder import AutoencoderConfig, train_autoencoder
from jobs.pretrain.classifier import ClassifierConfig, accuracy, train_classifier
from jobs.pretrain.self_distill import SelfDistillConfig, knn_accuracy, normalise, self_distill
from pipeline.datasets import Listing, list_images
from pipeline.datasets.crop import BadImageError, decode_crop
from pipeline.evaluate.evaluator import evaluate
from pipeline.evaluate.features.factory import open_network
from pipeline.evaluate.reference_statistics import load_moments, moments_digest
from pipeline.extract.encoder import Encoder
from pipeline.extract.tasks import make_manifest, make_tasks, stream_name, with_tail
from pipeline.storage.files import TEMPORARY
from pipeline.storage.locks import exclusive_lock
from pipeline.storage.npz import Archive
from pipeline.store import Store
from pipeline.store.manifest_diff import check_same_store
from schemas.errors import UserError
from schemas.evaluate import EvaluateConfig
from schemas.extract import ExtractConfig
from schemas.store import Manifest

RESOLUTION = 32
JUDGE_SEED = 0
ABOUT = "about.json"


class Images(NamedTuple):
    """Some images of CIFAR-10."""

    pixels: Tensor
    """uint8 (N, 3, 32, 32)."""
    labels: Tensor
    """int64 (N,)."""


class ArtifactCache:
    """Finished things in one folder, one folder each."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def get(
        self, name: str, options: Mapping[str, Any], make: Callable[[Path], dict[str, Any]]
    ) -> tuple[Path, dict[str, Any]]:
        """The folder of a thing and what ``make`` reported of it, made now where it is missing:
        ``make`` fills an empty folder. Raises ``UserError`` where other options made it."""
        final = self.folder / name
        wanted = json.loads(json.dumps(options))
        if not final.exists():
            with self.alone():
                if not final.exists():  # another process may just have ended
                    self._make(name, wanted, make)
        try:
            about = json.loads((final / ABOUT).read_text())
            made_with, report = about["options"], about["report"]
        except (OSError, ValueError, KeyError, TypeError):
            raise UserError(f"'{final / ABOUT}' cannot be read: remove '{final}'") from None
        if made_with != wanted:
            differing = sorted(
                key for key in {*made_with, *wanted} if made_with.get(key) != wanted.get(key)
            )
            raise UserError(
                f"the {name} in '{final}' was made with another {', '.join(differing)}: remove it "
                "and what was made with it, or choose another --work"
            )
        return final, report

    @contextmanager
    def alone(self) -> Iterator[None]:
        """While something is made: raises ``UserError`` where another process makes something. What
        one left that was killed over it goes."""
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
            say(f"making the {name}")
            about = {"options": options, "report": make(temporary)}
            (temporary / ABOUT).write_text(json.dumps(about, indent=1) + "\n")
            os.replace(temporary, self.folder / name)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def say(message: str) -> None:
    """To the person."""
    print(f"== {message}", file=sys.stderr, flush=True)


def unpack(source: str, held_out: int, folder: Path) -> dict[str, Any]:
    """The zip's ``train/CLASS/NAME`` to ``train`` and ``held_out``; of each class the last
    ``held_out`` names are held out. Raises ``UserError``."""
    try:
        with zipfile.ZipFile(source) as zipped:
            by_class: dict[str, list[str]] = {}
            for name in sorted(zipped.namelist()):
                parts = name.split("/")
                if len(parts) == 3 and parts[0] == "train" and parts[2]:
                    by_class.setdefault(parts[1], []).append(name)
            fewest = min((len(names) for names in by_class.values()), default=0)
            if fewest <= held_out:
                raise UserError(
                    f"--source '{source}': expected train/CLASS/NAME.jpg with more than {held_out} "
                    f"images of each class; found {len(by_class)} classes, the smallest of {fewest}"
                )
            for kind, names in by_class.items():
                if kind in (".", ".."):
                    raise UserError(f"--source '{source}' has a class named '{kind}'")
                for part, chosen in (
                    ("train", names[: len(names) - held_out]),
                    ("held_out", names[len(names) - held_out :]),
                ):
                    target = folder / part / kind
                    target.mkdir(parents=True)
                    for name in chosen:
                        (target / Path(name).name).write_bytes(zipped.read(name))
    except (OSError, zipfile.BadZipFile) as error:
        raise UserError(f"--source '{source}' is no zip that can be read: {error}") from None
    return {"classes": len(by_class), "images": sum(map(len, by_class.values()))}


def read_images(folder: Path) -> Images:
    """All pictures of ``folder/CLASS``; raises ``UserError`` where one is damaged."""
    pixels, labels = [], []
    for label, kind in enumerate(sorted(path for path in folder.iterdir() if path.is_dir())):
        for path in sorted(kind.iterdir()):
            try:
                pixels.append(decode_crop(path.read_bytes(), RESOLUTION))
            except (OSError, BadImageError) as error:
                raise UserError(f"'{path}' cannot be used: {error}") from None
            labels.append(label)
    stacked = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous()
    return Images(stacked, torch.tensor(labels))


def make_teacher(
    folder: Path, train: Images, held_out: Images, config: SelfDistillConfig, device: str
) -> dict[str, Any]:
    """Self-distilled without labels; labels of held-out images say what it knows."""
    backbone = self_distill(train.pixels, config, device)
    save_file(backbone.state_dict(), folder / "teacher.safetensors")
    return {"knn_held_out": {**knn_accuracies(backbone, held_out)}}


@torch.inference_mode()
def knn_accuracies(backbone: Any, images: Images, k: int = 20) -> dict[str, float]:
    """Leave-one-out k-NN accuracy among ``images``, by feature; raw pixels beside them."""
    found = [
        backbone.forward_features(normalise(batch.float() / 255))
        for batch in images.pixels.split(256)
    ]
    tokens = torch.cat(found)
    features = {
        "class token": tokens[:, 0],
        "mean patch": tokens[:, backbone.num_prefix_tokens :].mean(1),
        "raw pixels": images.pixels.float().flatten(1) - images.pixels.float().mean(),
    }
    return {name: knn_accuracy(values, images.labels, k) for name, values in features.items()}


def make_autoencoder(
    folder: Path, train: Images, config: AutoencoderConfig, device: str
) -> dict[str, Any]:
    """In diffusers' format."""
    model, report = train_autoencoder(train.pixels, config, device)
    model.save_pretrained(folder)
    return report.model_dump()


def make_judge(
    folder: Path, train: Images, held_out: Images, config: ClassifierConfig, device: str
) -> dict[str, Any]:
    """The network whose features are compared."""
    model = train_classifier(train.pixels, train.labels, config, device)
    save_file(model.state_dict(), folder / "judge.safetensors")
    return {"held_out_accuracy": accuracy(model, held_out.pixels, held_out.labels)}


def complete_store(shelf: ArtifactCache, config: ExtractConfig, device: str, threads: int) -> Store:
    """What ``python -m pipeline.extract`` does, in this process and without Ray: shards that are
    there stay. Raises ``UserError`` where other options or networks made them, or another process
    makes something on the shelf."""
    assert config.store is not None
    listing = list_images(config)
    encoder = Encoder(config, device=device, threads=threads)
    manifest = make_manifest(config, listing, encoder.describe())
    if Store.exists(config.store):
        store = Store.open(config.store)
        check_same_store(store.manifest, manifest, store.shown_url)
        if store.has_index() and not store.missing_shards(stream_name(config)):
            return store
    with shelf.alone():
        return _make_store(config, listing, encoder, manifest)


def _make_store(
    config: ExtractConfig, listing: Listing, encoder: Encoder, manifest: Manifest
) -> Store:
    assert config.store is not None
    if Store.exists(config.store):
        store = Store.open(config.store)
    else:
        tail = encoder.save_tail(config.store)
        store = Store.create(config.store, with_tail(manifest, stream_name(config), tail))
    missing = set(store.missing_shards(stream_name(config)))
    tasks = [task for task in make_tasks(listing, config.shard_size) if task.shard in missing]
    for task in tqdm(tasks, unit="shard", desc="extract", file=sys.stderr):
        result = encoder.encode_shard(store.url, store.manifest, task)
        if result.bad_images:
            bad = result.bad_images[0]
            raise UserError(f"bad image {bad.path}: {bad.error}")
    store.finish()
    return store


def judged_by(judge: Path, config: ClassifierConfig) -> dict[str, Any]:
    """The options that name the judge's features, for training and evaluation alike."""
    return {
        "network": config.name,
        "network_weights": str(judge / "judge.safetensors"),
        "network_size": RESOLUTION,
    }


def make_reference(
    folder: Path, train: Path, held_out: Path, judge: Mapping[str, Any], images: int, device: str
) -> dict[str, Any]:
    """Statistics of the training images, and the distance of as many held-out ones as are drawn:
    what a perfect model would reach."""
    place = str(folder / "reference.npz")
    asked = {"reference": str(train), "resolution": RESOLUTION, "batch_size": 500, **judge}
    evaluate(EvaluateConfig.model_validate({**asked, "save_reference": place}), device)
    floor = {**asked, "reference": place, "samples": str(held_out), "max_images": images}
    found = evaluate(EvaluateConfig.model_validate(floor), device)
    assert found is not None
    return {"held_out_fid": found.fid, "samples": found.samples}


def digest_of_reference(folder: Path, judge: Mapping[str, Any]) -> str:
    """What rows of evaluations say of it, wherever it lies. Raises ``UserError``."""
    place = str(folder / "reference.npz")
    options = EvaluateConfig.model_validate({"reference": place, **judge})
    return moments_digest(
        load_moments(Archive(place, "reference"), open_network(options, device="cpu"))
    )


def dumped(config: BaseModel) -> dict[str, Any]:
    """A config as plain data."""
    return config.model_dump(mode="json")
