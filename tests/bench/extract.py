"""Extraction of a few shards by one encoder against the forward passes of its two networks."""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pipeline.cli.config_files import merge
from pipeline.cost_estimate.meta_models import STABLE_DIFFUSION
from pipeline.datasets import list_images
from pipeline.extract.encoder import Encoder
from pipeline.extract.latent_sources import AutoencoderLatents
from pipeline.extract.tasks import make_manifest, make_tasks, with_tail
from pipeline.store import Store
from pipeline.targets.cuts import cut_values
from schemas.extract import PRESETS, ExtractConfig
from tests.bench.images import load_crops
from tests.bench.options import ExtractOptions as Options
from tests.bench.report import Heading, Report, Table
from tests.bench.timing import Clock

HEADINGS = (
    Heading("what", "what"),
    Heading("images_per_second", "images/s", ".2f"),
    Heading("share", "/ networks alone", ".3f"),
    Heading("spread", "from .. to"),
)


def run(options: Options) -> Report:
    clock = Clock.of(options.device)
    on_gpu = clock.device.type == "cuda"
    count = options.images or (1024 if on_gpu else 4)
    batch = options.batch or (64 if on_gpu else 2)
    with tempfile.TemporaryDirectory(prefix="haste-bench-") as folder:
        config = _config(Path(folder), options, count, batch)
        threads = options.decoders if on_gpu else options.threads
        encoder = Encoder(config, device=clock.device.type, threads=threads)
        extraction = Extraction(Path(folder), config, encoder)
        networks = Networks(config, encoder, count)
        times: dict[str, list[float]] = {"networks alone": [], "extraction": []}
        for number in range(options.rounds + 1):
            for name, call in (("networks alone", networks.run), ("extraction", extraction.run)):
                start = time.perf_counter()
                computed = clock.time(call)
                # a GPU waits for decoding and writing, so wall time counts there
                seconds = time.perf_counter() - start if on_gpu else computed
                if number:  # the first round warms up
                    times[name].append(seconds)
            print(f"round {number}", file=sys.stderr, flush=True)
    table = Table(f"{options.networks}, {options.cut}", HEADINGS)
    for name, seconds_of in times.items():
        shares = [a / b for a, b in zip(times["networks alone"], seconds_of, strict=True)]
        table.rows.append(
            {
                "what": name,
                "images_per_second": count / statistics.median(seconds_of),
                "share": statistics.median(shares),
                "spread": f"{min(shares):.2f} .. {max(shares):.2f}",
            }
        )
    last = table.rows[-1]
    about = {"device": clock.name, "clock": clock.about, "images": count, "batch": batch}
    headline = {
        "over_networks_alone": last["share"],
        "images_per_second": last["images_per_second"],
    }
    return Report(about, [table], headline)


class Extraction:
    """Extraction from JPEG files to committed shards, into a new store at each run."""

    def __init__(self, folder: Path, config: ExtractConfig, encoder: Encoder) -> None:
        self.folder = folder
        self.encoder = encoder
        listing = list_images(config)
        self.tasks = make_tasks(listing, config.shard_size)
        self.manifest = make_manifest(config, listing, encoder.describe())
        self.cut = config.cut
        self.number = 0

    def run(self) -> None:
        self.number += 1
        folder = str(self.folder / f"store-{self.number}")
        Path(folder).mkdir()
        manifest = self.manifest
        if self.number == 1:  # a real store writes its tail once for a million images
            manifest = with_tail(manifest, self.cut, self.encoder.save_tail(folder))
        store = Store.create(folder, manifest)
        for task in self.tasks:
            assert self.encoder.encode_shard(store.url, manifest, task).committed


class Networks:
    """Forward passes of the same networks on crops in device memory."""

    def __init__(self, config: ExtractConfig, encoder: Encoder, count: int) -> None:
        assert isinstance(encoder.latents, AutoencoderLatents)
        self.config = config
        self.encoder = encoder
        self.autoencoder = encoder.latents.autoencoder
        self.rounds = count // config.batch_size
        size = (config.batch_size, 3, config.resolution, config.resolution)
        rng = torch.Generator().manual_seed(0)
        crops = torch.randint(256, size, generator=rng, dtype=torch.uint8)
        self.crops: Tensor = crops.to(encoder.device)

    @torch.inference_mode()
    def run(self) -> None:
        dtype = getattr(torch, self.encoder.precision)
        kind = self.encoder.device.type
        for _ in range(self.rounds):
            with torch.autocast(kind, dtype, enabled=dtype != torch.float32):
                cut_values(self.config.cut, self.encoder.teacher, self.crops)
            self.autoencoder.encode(self.crops)


def _config(folder: Path, options: Options, count: int, batch: int) -> ExtractConfig:
    source = folder / "images"
    own: dict[str, Any] = {"dataset": "folder", "source": str(source), "cut": options.cut}
    own |= {"batch_size": batch, "shard_size": min(count, 64), "order_seed": 1}
    own["store"] = str(folder / "store")
    if options.networks == "demo":
        values = merge(PRESETS["demo"], own)
    else:
        autoencoder = folder / "autoencoder"
        torch.manual_seed(0)
        diffusers.AutoencoderKL(**STABLE_DIFFUSION).save_pretrained(autoencoder)
        values = {**own, "autoencoder": str(autoencoder), "teacher": {"weights": "random"}}
    _write_images(source, count)
    return ExtractConfig.model_validate(values)


def _write_images(folder: Path, count: int) -> None:
    """Write JPEGs of ImageNet's usual size, from the available photographs."""
    crops, _ = load_crops(None, min(count, 16), 400)
    for number in range(count):
        path = folder / f"class{number % 4}" / f"{number:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.asarray(crops[number % len(crops)].permute(1, 2, 0))
        Image.fromarray(pixels).save(path, quality=90)
