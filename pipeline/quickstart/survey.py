"""Images of a source as ``pipeline.extract`` will list them: number, classes, sizes, bad ones."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipeline.cli.progress import progress_bar
from pipeline.datasets import list_images, open_reader
from pipeline.datasets.crop import BadImageError, decode_crop, to_rgb
from pipeline.datasets.listing import ImageItem
from pipeline.quickstart.layout import Layout, find_layout
from pipeline.storage.files import redact
from schemas.errors import UserError
from schemas.extract import ExtractConfig
from schemas.validation import validate

MAX_EXAMINED = 2000
"""Images that are decoded: all of a small data set, else some of each part."""
PROBE = 32
"""Pixels per side of the crops that tell grey from colour."""
NOT_READ = (".heic", ".heif", ".jxl", ".svg", ".cr2", ".cr3", ".nef", ".arw", ".dng", ".raw")
"""Suffixes of photographs and drawings that Pillow does not read."""


@dataclass(frozen=True)
class Survey:
    """Facts about a source."""

    layout: Layout
    files: int
    examined: int
    bad: tuple[tuple[str, str], ...]
    """Path and reason of each bad one among the examined."""
    names: tuple[str, ...]
    """Classes in the order of their numbers; numbers where the source has no names."""
    counts: tuple[int, ...]
    """Files of each class."""
    lost: tuple[int, ...]
    """Classes whose every file is bad."""
    sizes: tuple[tuple[int, int], ...]
    """Width and height of the examined images, sorted."""
    grey: bool
    """True if no examined image has colours."""

    @property
    def images(self) -> int:
        """Files that are images, as far as they were examined."""
        return self.files - len(self.bad)

    @property
    def short_side(self) -> int:
        """Median of the short sides, pixels."""
        sides = sorted(min(size) for size in self.sizes)
        return sides[len(sides) // 2]

    @property
    def mixed(self) -> bool:
        return len(set(self.sizes)) > 1

    @property
    def with_images(self) -> list[int]:
        """Numbers of the classes with images."""
        return [n for n, count in enumerate(self.counts) if count and n not in self.lost]


def survey_source(source: str, work: Path) -> Survey:
    """List all files of ``source`` and decode up to ``MAX_EXAMINED`` of them. Raises ``UserError``
    where it holds no images."""
    layout = find_layout(source, work)
    options: dict[str, Any] = {"dataset": layout.dataset, "source": layout.source}
    config = validate(ExtractConfig, options | layout.options, where="--source")
    listing = list_images(config)
    chosen = _evenly(listing.items, MAX_EXAMINED)
    read = open_reader(config)
    bad, sizes, grey = [], [], True
    good: Counter[int] = Counter()
    for item in progress_bar(chosen, unit="image", desc="examine", leave=False):
        try:
            size, is_grey = _examine(read(item))
        except (BadImageError, OSError) as error:
            bad.append((item.path or item.key, str(error)))
            continue
        good[item.label] += 1
        sizes.append(size)
        grey = grey and is_grey
    if not sizes:
        path, reason = bad[0]
        raise UserError(
            f"--source '{redact(source)}': none of {len(chosen)} files is an image "
            f"({path}: {reason}){conversion_advice(bad)}"
        )
    counts = Counter(item.label for item in listing.items)
    every = len(chosen) == len(listing.items)
    return Survey(
        layout=layout,
        files=len(listing.items),
        examined=len(chosen),
        bad=tuple(sorted(bad)),
        names=listing.class_names or tuple(str(n) for n in range(listing.num_classes)),
        counts=tuple(counts[n] for n in range(listing.num_classes)),
        lost=tuple(n for n in sorted(counts) if every and not good[n]),
        sizes=tuple(sorted(sizes)),
        grey=grey,
    )


def conversion_advice(bad: Sequence[tuple[str, str]]) -> str:
    """Advice about pictures in formats that are not read, from paths and reasons; often empty."""
    names = [path.lower() for path, _ in bad]
    found = [suffix for suffix in NOT_READ if any(name.endswith(suffix) for name in names)]
    return f"; convert files of {', '.join(found)} to JPEG" if found else ""


def _evenly(items: Sequence[ImageItem], count: int) -> list[ImageItem]:
    """At most ``count`` items: all, or the first of the listing's order, which is random, by the
    order of their paths, because tars and disks are read faster so."""
    return sorted(items[:count], key=lambda item: (item.path, item.offset))


def _examine(data: bytes) -> tuple[tuple[int, int], bool]:
    """Width and height, and True without colours. Raises ``BadImageError``."""
    decode_crop(data, PROBE)
    with Image.open(io.BytesIO(data)) as image:
        size = image.size
        if image.mode in {"1", "L", "LA", "La", "I", "I;16"}:
            return size, True
        image.draft("RGB", (PROBE, PROBE))
        pixels = np.asarray(to_rgb(image).resize((PROBE, PROBE)), np.int16)
    return size, int(np.abs(pixels - pixels[..., :1]).max()) <= 2
