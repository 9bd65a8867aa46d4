"""Small captioned sources, and the tiny text encoder of their tests."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.datasets import list_images
from pipeline.extract.encoder import Encoder
from pipeline.extract.target_store import open_store
from pipeline.extract.tasks import make_tasks
from pipeline.store import Store
from schemas.extract import PRESETS, ExtractConfig

TINY = {
    "hidden_size": 16,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
}
TEXT = {"keep": "embeddings", "weights": "random", "model_args": TINY}
CAPTIONS = {
    30: ["a red car", "A car, in RED", "one car"],
    7: ["two dogs"],
    12: ["a zebra in the rain", "stripes", "a horse?", "rain", "zebra 5", "a b c", "z", "more"],
}


def picture(number: int, size: tuple[int, int] = (44, 36)) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def write_coco(
    root: Path,
    captions: Mapping[int, Sequence[str]] | None = None,
    *,
    split: str = "train",
    files: Sequence[int] | None = None,
    **changes: object,
) -> Path:
    """COCO's layout with the ``files`` of image ids (default: all), and captions of image ids: the
    first of each image in the order of ``captions``, then the second of each, and so on."""
    captions = CAPTIONS if captions is None else captions
    folder = root / f"{split}2014"
    folder.mkdir(parents=True, exist_ok=True)
    for number in captions if files is None else files:
        (folder / f"{number:06d}.png").write_bytes(picture(number))
    rounds = max((len(texts) for texts in captions.values()), default=0)
    places = [(n, k) for k in range(rounds) for n in captions if k < len(captions[n])]
    content = {
        "images": [{"id": n, "file_name": f"{n:06d}.png"} for n in captions],
        "annotations": [
            {"id": 1000 - place, "image_id": n, "caption": captions[n][k]}
            for place, (n, k) in enumerate(places)
        ],
        **changes,
    }
    file = root / "annotations" / f"captions_{split}2014.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(content))
    return root


def coco_config(source: Path, store: Path, **changes: object) -> ExtractConfig:
    """The demo's small networks over MS-COCO, two images a shard."""
    values = {
        **PRESETS["demo"],
        "dataset": "coco",
        "source": str(source),
        "store": str(store),
        "crop": "square_lanczos",
        "text": TEXT,
        "shard_size": 2,
        "batch_size": 2,
        "compress": True,
        **changes,
    }
    return ExtractConfig.model_validate(values)


def extract_here(config: ExtractConfig) -> Store:
    """The extraction without Ray, in this process."""
    encoder = Encoder(config, device="cpu", threads=1)
    listing = list_images(config)
    store = open_store(config, listing, None, encoder)
    for task in make_tasks(listing, config.shard_size):
        result = encoder.encode_shard(store.url, store.manifest, task)
        assert result.committed, result
    store.finish()
    return Store.open(store.url)
