"""The Inception score of a stream of logits."""

from __future__ import annotations

import math

import torch
from torch import Tensor

SPLITS = 10
"""The published score is the mean over so many parts of the samples."""


class InceptionScore:
    """exp of the mutual information between image and class (Salimans et al., arXiv 1606.03498):
    mean over consecutive tenths of the images, as ADM's evaluator takes it of 50,000."""

    def __init__(self, count: int, splits: int = SPLITS) -> None:
        """``count`` images will come."""
        self._count, self._splits = count, splits
        self._seen = 0
        self._images = [0] * splits
        self._negentropy = [0.0] * splits
        self._classes: list[Tensor | None] = [None] * splits

    def add(self, logits_BC: Tensor) -> None:
        """The next images, in order."""
        log_p = logits_BC.double().log_softmax(1)
        numbers = torch.arange(self._seen, self._seen + len(log_p))
        # split i begins at image i * count // splits
        split_of = ((numbers + 1) * self._splits - 1) // self._count
        for split in split_of.unique().tolist():
            part = log_p[(split_of == split).to(log_p.device)]
            p = part.exp()
            self._images[split] += len(part)
            self._negentropy[split] += float((p * part).sum())
            before = self._classes[split]
            self._classes[split] = p.sum(0) if before is None else before + p.sum(0)
        self._seen += len(log_p)

    def score(self) -> float:
        """Between 1 and the number of classes. Raises ``ValueError`` before the first image."""
        scores = []
        for images, negentropy, classes in zip(
            self._images, self._negentropy, self._classes, strict=True
        ):
            if classes is not None:  # fewer images than splits leave some empty
                p = classes / images
                marginal = float(torch.xlogy(p, p).sum())
                scores.append(math.exp(negentropy / images - marginal))
        if not scores:
            raise ValueError("no images, no score")
        return sum(scores) / len(scores)
