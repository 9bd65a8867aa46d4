"""MS-COCO as U-ViT's and HASTE's scripts prepare it (``coco256_features``), for image i of a split:
train/{i}.png (the crop), train/{i}.npy (mean and log variance of the latent), train/{i}_{k}.npy
(embedding of caption k); beside train/ and val/ the embedding of the empty caption.

i is the rank of the image id. HASTE's script writes the pictures from values in [-1, 1] where
[0, 1] is expected, so that everything darker than middle grey is black; U-ViT's writes none.
"""

from __future__ import annotations

import re

from pipeline.datasets.folder import list_files
from pipeline.datasets.listing import ImageItem, Listing
from pipeline.storage.files import redact
from schemas.errors import UserError
from schemas.extract import Split
from schemas.store import CaptionCounts
from schemas.streams import MAX_CAPTIONS

NAME = re.compile(r"(0|[1-9][0-9]{0,9})(?:_(0|[1-9][0-9]{0,3}))?\.(npy|png)")
NULL = "empty_context.npy"


def list_coco_features(source: str, split: Split) -> Listing:
    """List one split in the order of its numbers; the key is the number. Raises ``UserError`` where
    numbers are missing, because they would be other images' then."""
    shown = redact(source)
    latents: dict[int, str] = {}
    contexts: dict[int, dict[int, str]] = {}
    images: set[int] = set()
    for path in list_files(source, split):
        match = NAME.fullmatch(path.removeprefix(f"{split}/"))
        if match is None:
            continue
        number = int(match[1])
        if match[3] == "png" and match[2] is None:
            images.add(number)
        elif match[2] is None:
            latents[number] = path
        elif match[3] == "npy":
            contexts.setdefault(number, {})[int(match[2])] = path
    if not latents:
        raise UserError(
            f"--source '{shown}' has no latents {split}/0.npy, {split}/1.npy, ...: expected "
            "MS-COCO as U-ViT's and HASTE's scripts prepare it"
        )
    if sorted(latents) != list(range(len(latents))):
        first = next(n for n in range(len(latents)) if n not in latents)
        raise UserError(
            f"--source '{shown}': {split}/{first}.npy is missing; numbers are from 0 on"
        )
    items, beyond = [], 0
    for number in range(len(latents)):
        held = contexts.get(number, {})
        if sorted(held) != list(range(len(held))) or not held:
            first = next(k for k in range(len(held) + 1) if k not in held)
            raise UserError(f"--source '{shown}': {split}/{number}_{first}.npy is missing")
        if number not in images:
            raise UserError(
                f"--source '{shown}': {split}/{number}.png is missing, the picture for the "
                "teacher; HASTE's extract_mscoco_feature.py writes it"
            )
        kept = tuple(held[k] for k in range(min(len(held), MAX_CAPTIONS)))
        beyond += len(held) - len(kept)
        path = f"{split}/{number}.png"
        items.append(ImageItem(str(number), 0, path, latent=latents[number], contexts=kept))
    orphans = len((contexts.keys() | images) - latents.keys())
    counts = CaptionCounts(
        captions=sum(len(item.contexts) for item in items),
        beyond_limit=beyond,
        without_images=orphans,
    )
    return Listing(items, 1, captions=counts)
