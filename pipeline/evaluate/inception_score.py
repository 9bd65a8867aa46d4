"""The Inception score of a stream of logits."""

from __future__ import annotations

import math

import torch
from torch import Tensor

SPLITS = 10
"""Parts of the samples; the published score is the mean over them."""


class InceptionScore:
    """exp of the mutual information between image and class (Salimans et al., arXiv 1606.03498):
    the mean over consecutive tenths of the images, as in ADM's evaluator for 50,000 images."""

    def __init__(self, count: int, splits: int = SPLITS) -> None:
        """``count`` images will be added."""
        self._count, self._splits = count, splits
        self._added = 0
        self._images = [0] * splits
        self._negentropy = [0.0] * splits
        self._classes: list[Tensor | None] = [None] * splits

    def add(self, logits_BC: Tensor) -> None:
        """Add the next images, in order."""
        log_p = logits_BC.double().log_softmax(1)
        numbers = torch.arange(self._added, self._added + len(log_p))
        # split i starts at image i * count // splits
        split_of = ((numbers + 1) * self._splits - 1) // self._count
        for split in split_of.unique().tolist():
            part = log_p[(split_of == split).to(log_p.device)]
            p = part.exp()
            self._images[split] += len(part)
            self._negentropy[split] += float((p * part).sum())
            total = self._classes[split]
            self._classes[split] = p.sum(0) if total is None else total + p.sum(0)
        self._added += len(log_p)

    def score(self) -> float:
        """Between 1 and the number of classes. Raises ``ValueError`` before the first image."""
        scores = []
        for images, negentropy, classes in zip(
            self._images, self._negentropy, self._classes, strict=True
        ):
            if classes is not None:  # splits are empty where there are fewer images
                p = classes / images
                marginal = float(torch.xlogy(p, p).sum())
                scores.append(math.exp(negentropy / images - marginal))
        if not scores:
            raise ValueError("no images have been added, so there is no score")
        return sum(scores) / len(scores)
