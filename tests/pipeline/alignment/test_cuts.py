"""Every cut gives the same targets, and the online baseline needs nothing but the store."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.alignment.tail import TAIL, load_tail
from pipeline.alignment.targets import Targets, open_targets
from pipeline.datasets import Listing, list_images
from pipeline.extract.encoder import Encoder
from pipeline.extract.plan import make_manifest, make_tasks
from pipeline.inspect.draw import draw_sample
from pipeline.store import Store, StreamReader
from pipeline.train.local import LocalCheckpoints, newest_checkpoint
from pipeline.train.loop import train
from pipeline.train.metrics import read_metrics
from schemas.alignment import AlignmentConfig
from schemas.errors import UserError
from schemas.extract import PRESETS, ExtractConfig
from schemas.options import merge
from schemas.run import RunConfig

SAMPLES = 8
ALIGNMENT = AlignmentConfig(feature_depth=2, student_layers=(1, 2), teacher_layers=(5, 3))


def encode(folder: Path, **options: Any) -> Store:
    """The first digits through the demo's networks, one shard and one batch."""
    values = {"dataset": "demo", "store": str(folder), "shard_size": SAMPLES, "batch_size": SAMPLES}
    config = ExtractConfig.model_validate(merge({**PRESETS["demo"], **values}, options))
    encoder = Encoder(config, device="cpu", threads=1)
    about = encoder.describe()
    everything = list_images(config)
    listing = Listing(everything.items[:SAMPLES], everything.num_classes)
    manifest = make_manifest(
        config,
        listing,
        about.teacher,
        about.autoencoder,
        about.compute,
        encoder.save_tail(str(folder)),
    )
    store = Store.create(str(folder), manifest)
    for task in make_tasks(listing, SAMPLES):
        encoder.encode_shard(store.url, manifest.streams, task)
    store.finish()
    return store


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Store]:
    folder = tmp_path_factory.mktemp("cuts")
    return {
        "exact": encode(folder / "exact", codec="float32"),
        "half": encode(folder / "half"),
        "image": encode(folder / "image", cut="image"),
    }


def targets_of(store: Store, heads: int = 6) -> Targets:
    torch.set_num_threads(1)
    source = open_targets(store, ALIGNMENT, heads, torch.device("cpu"))
    rows = np.arange(SAMPLES)
    columns = StreamReader(store, source.stream).read(np.zeros_like(rows), rows)
    return source({name: torch.from_numpy(array) for name, array in columns.items()})


def test_online_teacher_gives_what_the_maps_hold_bit_for_bit(stores: dict[str, Store]) -> None:
    exact, online = targets_of(stores["exact"]), targets_of(stores["image"])
    assert exact.features is not None
    assert exact.attention is not None
    assert torch.equal(exact.features, online.features)
    assert torch.equal(exact.attention, online.attention)
    assert exact.attention.shape == (SAMPLES, 2, 6, 64, 64)
    torch.testing.assert_close(exact.attention.sum(-1), torch.ones(SAMPLES, 2, 6, 64))


def test_half_precision_maps_differ_by_their_rounding(stores: dict[str, Store]) -> None:
    exact, half = targets_of(stores["exact"]), targets_of(stores["half"])
    torch.testing.assert_close(half.features, exact.features, rtol=1e-3, atol=1e-3)
    assert exact.attention is not None
    assert half.attention is not None
    divergence = (exact.attention * (exact.attention / half.attention).log()).sum(-1)
    assert divergence.max() < 1e-5  # nats a row


def test_only_the_aligned_heads_are_decoded(stores: dict[str, Store]) -> None:
    for store in stores.values():
        few, all_heads = targets_of(store, heads=2), targets_of(store)
        assert few.attention is not None
        assert all_heads.attention is not None
        assert torch.equal(few.attention, all_heads.attention[:, :, :2])


def test_runs_on_either_cut_have_the_same_losses(stores: dict[str, Store], tmp_path: Path) -> None:
    rows = {}
    for name, store in stores.items():
        config = tiny_run_on(store)
        folder = tmp_path / name
        summary = train(config, folder, LocalCheckpoints(folder, keep=1).save)
        assert summary["bytes_read"][store.manifest.cut]["after"] == 0
        rows[name] = [
            [row[key] for key in ("denoising", "feature", "attention", "grad_norm") if key in row]
            for row in read_metrics(folder / "metrics.jsonl")
        ]
    for expected, online, half in zip(rows["exact"], rows["image"], rows["half"], strict=True):
        assert online == pytest.approx(expected, rel=1e-6)  # other batches, other summation order
        assert half == pytest.approx(expected, rel=1e-3)


def test_a_run_resumed_after_the_termination_needs_no_tail(
    stores: dict[str, Store], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    save = LocalCheckpoints(folder, keep=2).save
    config = tiny_run_on(stores["image"]).model_copy(update={"steps": 5})
    train(config.model_copy(update={"steps": 4}), folder, save)
    tail = Path(stores["image"].root) / TAIL
    tail.rename(tail.with_suffix(".away"))
    try:
        newest = newest_checkpoint(folder)
        assert train(config, folder, save, resume=newest)["steps"] == 5
        with pytest.raises(UserError, match="is missing"):
            train(config, tmp_path / "fresh", save)
    finally:
        tail.with_suffix(".away").rename(tail)


def tiny_run_on(store: Store) -> RunConfig:
    """Four steps on the digits, three of them aligned."""
    return RunConfig.model_validate(
        {
            "store": store.url,
            "steps": 4,
            "global_batch": 4,
            "log_every": 1,
            "student": {
                "model": "SiT-S/1",
                "depth": 3,
                "width": 24,
                "heads": 6,
                "latent_size": 8,
                "num_classes": 10,
            },
            "alignment": {**ALIGNMENT.model_dump(), "termination": {"kind": "fixed", "step": 3}},
            "optimizer": {"learning_rate": 1e-3},
        }
    )


def test_a_damaged_tail_is_refused(tmp_path: Path) -> None:
    store = encode(tmp_path, cut="image")
    path = tmp_path / TAIL
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match="checksum is wrong"):
        load_tail(store, (3,))
    path.unlink()
    with pytest.raises(UserError, match="is missing: run the extraction again"):
        load_tail(store, (3,))


def test_a_sample_of_every_cut_can_be_drawn(stores: dict[str, Store], tmp_path: Path) -> None:
    for name, store in stores.items():
        picture = tmp_path / f"{name}.png"
        draw_sample(store, store.record(0).keys[3], picture)
        assert np.asarray(Image.open(picture)).std() > 10
