"""Options of ``python -m pipeline.quickstart``."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from schemas.base import Strict


class QuickstartConfig(Strict):
    """One's own images and the time for them."""

    source: str | None = None
    """Images: a folder (of folders, one for each class, or of images alone), tars, a zip, or a data
    set as it is distributed (ImageNet, MS-COCO, CIFAR, MNIST). Splits are recognised: the training
    images are used."""
    work: str | None = None
    """Folder for the configs, networks, store, run and pictures. Default: runs/ and the source's
    name."""
    hours: Annotated[float, Field(gt=0, le=10_000, allow_inf_nan=False)] = 0.5
    """Time for everything, from the images to the pictures, on this machine. Estimates are those of
    an idle machine."""
    run: bool = False
    """Run the three commands, one after the other. After an interruption the same command
    continues."""
    as_json: Annotated[bool, Field(alias="json")] = False
    """Print one JSON object: images, classes (names), commands, seconds, bytes, files."""
