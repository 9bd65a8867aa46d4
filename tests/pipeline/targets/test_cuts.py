"""Every cut gives the same targets, and the online baseline needs nothing but the store."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.alignment.losses import Targets
from pipeline.checkpoints.local import LocalCheckpoints, latest_checkpoint
from pipeline.runs.metrics import read_metrics
from pipeline.store import Store, StreamReader
from pipeline.targets.sources import Wanted, open_targets, read_targets
from pipeline.targets.tail import load_tail, tail_file
from pipeline.train.loop import train
from pipeline.visualization.store_sample import draw_sample
from schemas.alignment import AlignmentConfig
from schemas.errors import UserError
from schemas.run import RunConfig
from tests.encoded import SAMPLES, encode
from tests.helpers import needs_compiler

ALIGNMENT = AlignmentConfig(feature_depth=2, student_layers=(1, 2), teacher_layers=(5, 3))


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Store]:
    folder = tmp_path_factory.mktemp("cuts")
    return {
        "exact": encode(folder / "exact", codec="float32"),
        "image": encode(folder / "image", cut="image"),
        "qk": encode(folder / "qk", cut="qk", codec="float32"),
        "activations": encode(folder / "activations", cut="activations", codec="float32"),
        "zarr": encode(folder / "zarr", codec="float32", format="zarr"),
        "maps-half": encode(folder / "half", codec="float16"),
        **{
            f"{cut}-{codec}": encode(folder / f"{cut}-{codec}", cut=cut, codec=codec)
            for cut in ("maps", "qk", "activations")
            for codec in ("faithful", "int8", "small", "bfloat16")
        },
        "activations-zarr": encode(folder / "az", cut="activations", format="zarr"),
    }


def targets_of(store: Store, heads: int = 6) -> Targets:
    torch.set_num_threads(1)
    rows = np.arange(SAMPLES)
    wanted = Wanted(features=True, layers=ALIGNMENT.teacher_layers, heads=heads)
    return read_targets(store, np.zeros_like(rows), rows, wanted)


def divergence(exact: Targets, other: Targets) -> torch.Tensor:
    """KL of attention rows in nats."""
    assert exact.attention is not None
    assert other.attention is not None
    floor = torch.finfo(torch.float32).tiny
    ratio = exact.attention.clamp_min(floor) / other.attention.clamp_min(floor)
    return (exact.attention.double() * ratio.double().log()).sum(-1)


@pytest.mark.parametrize("cut", ["image", "activations", "zarr"])
def test_replayed_teacher_gives_what_the_maps_hold_bit_for_bit(
    stores: dict[str, Store], cut: str
) -> None:
    exact, replayed = targets_of(stores["exact"]), targets_of(stores[cut])
    assert exact.features is not None
    assert exact.attention is not None
    assert torch.equal(exact.features, replayed.features)
    assert torch.equal(exact.attention, replayed.attention)
    assert exact.attention.shape == (SAMPLES, 2, 6, 64, 64)
    torch.testing.assert_close(exact.attention.sum(-1), torch.ones(SAMPLES, 2, 6, 64))


@needs_compiler
@pytest.mark.filterwarnings("error:Dynamo detected")
@pytest.mark.parametrize(
    "name",
    [
        "exact",
        "maps-half",
        "maps-bfloat16",
        "maps-faithful",
        "maps-small",
        "qk-int8",
        "image",
        "activations",
    ],
)
def test_compiled_targets_are_the_plain_ones(stores: dict[str, Store], name: str) -> None:
    """Also of a smaller batch, after which the larger one's graph is still its own."""
    store = stores[name]
    wanted = Wanted(features=True, layers=ALIGNMENT.teacher_layers, heads=4)
    cpu = torch.device("cpu")
    plain = open_targets(store, None, wanted, cpu)
    torch._dynamo.reset()
    compiled = open_targets(store, None, wanted, cpu, compiled=True)
    reader = StreamReader(store, plain.stream)
    graphs = []
    for size in (SAMPLES, 2, SAMPLES, 2):
        rows = np.arange(size)
        columns = {n: torch.from_numpy(a) for n, a in reader.read(0 * rows, rows).items()}
        with torch.no_grad():
            one, other = plain(columns), compiled(columns)
        if name in {"image", "activations"}:  # blocks of the teacher are fused, too
            torch.testing.assert_close(one.features, other.features, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(one.attention, other.attention, rtol=1e-4, atol=1e-7)
        else:
            assert torch.equal(one.features, other.features)
            torch.testing.assert_close(one.attention, other.attention, rtol=2e-6, atol=1e-9)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[0] < graphs[1] == graphs[2] == graphs[3]


def test_centred_keys_give_the_same_attention(stores: dict[str, Store]) -> None:
    exact, factors = targets_of(stores["exact"]), targets_of(stores["qk"])
    assert torch.equal(exact.features, factors.features)
    torch.testing.assert_close(factors.attention, exact.attention, rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("name", "kl", "cosine"),
    [
        ("maps-half", 1e-6, 1 - 1e-6),
        ("maps-faithful", 1e-4, 0.9999),
        ("maps-int8", 1e-4, 0.9999),
        ("maps-small", 1e-3, 0.999),
        ("maps-bfloat16", 1e-4, 0.9999),
        ("qk-faithful", 2e-4, 0.9999),
        ("qk-int8", 2e-4, 0.9999),
        ("qk-small", 1e-3, 0.999),
        ("qk-bfloat16", 2e-4, 0.9999),
        ("activations-faithful", 2e-4, 0.9999),
        ("activations-int8", 2e-4, 0.9999),
        ("activations-small", 1e-3, 0.999),
        ("activations-bfloat16", 2e-4, 0.9999),
        ("activations-zarr", 2e-4, 0.9999),
    ],
)
def test_codecs_keep_targets_within_their_promise(
    stores: dict[str, Store], name: str, kl: float, cosine: float
) -> None:
    exact, coded = targets_of(stores["exact"]), targets_of(stores[name])
    assert divergence(exact, coded).mean() < kl
    assert exact.features is not None
    assert coded.features is not None
    assert torch.cosine_similarity(exact.features, coded.features, dim=-1).min() > cosine


def test_either_backend_stores_the_same_numbers(stores: dict[str, Store]) -> None:
    tar, zarr = targets_of(stores["activations-faithful"]), targets_of(stores["activations-zarr"])
    assert torch.equal(tar.features, zarr.features)
    assert torch.equal(tar.attention, zarr.attention)


def test_only_what_is_asked_for_is_decoded(stores: dict[str, Store]) -> None:
    rows = np.arange(SAMPLES)
    for store in stores.values():
        no_features = Wanted(features=False, layers=(3,), heads=6)
        attention = read_targets(store, np.zeros_like(rows), rows, no_features)
        assert attention.features is None
        assert torch.equal(attention.attention[:, 0], targets_of(store).attention[:, 1])
        features = read_targets(store, np.zeros_like(rows), rows, Wanted(True, (), 0))
        assert features.attention is None
        assert torch.equal(features.features, targets_of(store).features)
        few, all_heads = targets_of(store, heads=2), targets_of(store)
        assert few.attention is not None
        assert all_heads.attention is not None
        assert torch.equal(few.attention, all_heads.attention[:, :, :2])


def test_runs_on_either_cut_have_the_same_losses(stores: dict[str, Store], tmp_path: Path) -> None:
    rows = {}
    for name in ("exact", "image", "qk", "activations", "maps-half"):
        store = stores[name]
        config = tiny_run_on(store)
        folder = tmp_path / name
        summary = train(config, folder, LocalCheckpoints(folder, keep=1).save)
        assert summary["bytes_read"][store.manifest.teacher_stream()[0]]["after"] == 0
        rows[name] = [
            [row[key] for key in ("denoising", "feature", "attention", "grad_norm") if key in row]
            for row in read_metrics(folder / "metrics.jsonl")
        ]
    for step, expected in enumerate(rows["exact"]):
        for cut in ("image", "qk", "activations"):  # other batches, other summation order
            assert rows[cut][step] == pytest.approx(expected, rel=1e-6)
        assert rows["maps-half"][step] == pytest.approx(expected, rel=1e-3)


def test_a_run_resumed_after_the_termination_needs_no_tail(
    stores: dict[str, Store], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    save = LocalCheckpoints(folder, keep=2).save
    config = tiny_run_on(stores["image"]).model_copy(update={"steps": 5})
    train(config.model_copy(update={"steps": 4}), folder, save)
    tail = Path(stores["image"].root) / tail_file("image")
    tail.rename(tail.with_suffix(".away"))
    try:
        newest = latest_checkpoint(folder)
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
    store = encode(tmp_path, cut="activations")
    path = tmp_path / tail_file("activations")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match="checksum is wrong"):
        load_tail(store, "activations", (3,))
    path.unlink()
    with pytest.raises(UserError, match="is missing: run the extraction again"):
        load_tail(store, "activations", (3,))


def test_a_sample_of_every_cut_can_be_drawn(stores: dict[str, Store], tmp_path: Path) -> None:
    for name, store in stores.items():
        picture = tmp_path / f"{name}.png"
        draw_sample(store, store.record(0).keys[3], picture)
        assert np.asarray(Image.open(picture)).std() > 10
