"""The judge: a classifier trained apart from teacher and students, and its view of a checkpoint.

Its features give the Fréchet distance and precision and recall; its classes, the share of images
that it takes for the class that they were sampled for.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from safetensors.torch import load_file
from torch import Tensor

from jobs.experiments.artifacts import CLASSIFIER_FILE, Images
from jobs.experiments.options import JudgeConfig
from pipeline.autoencoders import decode_scaled, open_decoder
from pipeline.checkpoints.student import load_student
from pipeline.evaluate.frechet import Factored, FeatureStatistics, frechet_distance
from pipeline.evaluate.precision_recall import precision_recall
from pipeline.hashing import sha256_of_module
from pipeline.precision import arithmetic, choose_arithmetic
from pipeline.pretrain.common import normalise
from pipeline.pretrain.options import ClassifierConfig
from pipeline.sampling.batches import choose_labels, plan_batches
from pipeline.sampling.generate import draw_latents
from pipeline.storage.files import open_url, write_atomic
from pipeline.store import Store

MEASURES = ("frechet", "agreement", "precision", "recall")


class Judge:
    """The classifier with its features of the training images."""

    def __init__(
        self,
        folder: Path,
        config: ClassifierConfig,
        options: JudgeConfig,
        train: Images,
        device: str,
    ) -> None:
        """``folder`` holds the classifier's weights."""
        self.options, self.device = options, device
        classes = int(train.labels.max()) + 1
        model = timm.create_model(config.name, pretrained=False, num_classes=classes)
        model.load_state_dict(load_file(folder / CLASSIFIER_FILE))
        self._model = model.requires_grad_(False).eval().to(device)
        self._classes = tuple(range(classes))
        self._train, _ = self._look(train.pixels)
        self._reference = Factored.of(_moments(self._train))
        self.identity = {
            "judge": sha256_of_module(model),
            "images": options.images,
            "sampler": options.sampler.in_force.model_dump(mode="json"),
            "neighbours": options.neighbours,
        }
        """Values that must be equal for measurements to be comparable."""

    def measure(self, images: Images) -> dict[str, float]:
        """``MEASURES`` of images and the classes that they should have."""
        features, predicted = self._look(images.pixels)
        neighbours = self.options.neighbours
        near, covered = precision_recall(features.numpy(), self._train.numpy(), neighbours)
        agreement = float((predicted == images.labels).double().mean())
        distance = frechet_distance(self._reference, _moments(features))
        values = (distance, agreement, near, covered)
        return dict(zip(MEASURES, values, strict=True))

    def sample(self, checkpoint: Path, store: Store) -> Images:
        """Images of the averaged weights of a checkpoint. Image i has class i modulo their number
        and noise that is a function of i, so that all runs are measured on the same noise."""
        student, state = load_student(checkpoint)
        student.to(self.device)
        decoder = open_decoder(None, store.manifest.autoencoder, option="the experiment's decoder")
        decoder.to(torch.device(self.device))
        labels = choose_labels("balanced", self._classes, 0, 0, self.options.images)
        precision = choose_arithmetic("auto", self.device)
        pixels = []
        for batch in plan_batches(len(labels), self.options.batch_size):
            latents = draw_latents(
                student,
                labels[batch.first : batch.first + batch.count],
                self.options.sampler,
                path=state.config.diffusion.path,
                first_index=batch.first,
                precision=precision,
            )
            with arithmetic(precision):
                pixels.append(decode_scaled(decoder, torch.nan_to_num(latents)).cpu())
        return Images(torch.cat(pixels), torch.tensor(labels))

    @torch.inference_mode()
    def _look(self, pixels_N3RR: Tensor) -> tuple[Tensor, Tensor]:
        """Features (N, D) before the last layer, and classes (N,), on the CPU."""
        features, classes = [], []
        for batch in pixels_N3RR.split(256):
            maps = self._model.forward_features(normalise(batch.to(self.device).float() / 255))
            pooled = self._model.forward_head(maps, pre_logits=True)
            features.append(pooled.float().cpu())
            classes.append(self._model.get_classifier()(pooled).argmax(-1).cpu())
        return torch.cat(features), torch.cat(classes)


class Verdicts:
    """Measurements of one run's checkpoints, in a file."""

    def __init__(self, path: Path, identity: dict[str, Any]) -> None:
        """Measurements of another ``identity`` are dropped."""
        self.path, self._identity = path, json.loads(json.dumps(identity))
        self.rows: dict[int, dict[str, float]] = {}
        try:
            saved = json.loads(path.read_text())
            if saved["identity"] == self._identity:
                self.rows = {int(step): row for step, row in saved["rows"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            pass  # missing or damaged: measured again

    def add(self, step: int, row: dict[str, float]) -> None:
        """Add a row and write the file."""
        self.rows[step] = row
        rows = {str(number): self.rows[number] for number in sorted(self.rows)}
        text = json.dumps({"identity": self._identity, "rows": rows}, indent=1) + "\n"
        filesystem, root = open_url(str(self.path), what="--output")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(filesystem, root, text.encode())


def _moments(features: Tensor) -> FeatureStatistics:
    statistics = FeatureStatistics(features.shape[1])
    statistics.add(features)
    return statistics


def nearest_accuracy(
    known: Tensor, labels: np.ndarray, asked: Tensor, expected: np.ndarray, k: int = 20
) -> float:
    """Share of ``asked`` features (M, D) whose ``k`` nearest of ``known`` (N, D) by cosine mostly
    have the ``expected`` class."""
    unit = torch.nn.functional.normalize
    nearest = (unit(asked, dim=-1) @ unit(known, dim=-1).mT).topk(min(k, len(known))).indices
    votes = torch.nn.functional.one_hot(torch.from_numpy(labels)[nearest]).sum(1)
    return float((votes.argmax(-1) == torch.from_numpy(expected)).float().mean())
