"""`inspect --fidelity`: measured against the teacher, and honest about what it measures."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from pipeline.assets import DEMO_TEACHER
from pipeline.datasets.digits import list_digits, read_digit
from pipeline.inspect.__main__ import main
from pipeline.inspect.fidelity import kl_of_rows, open_teacher
from pipeline.inspect.source_images import SourceImages
from pipeline.store import Store
from pipeline.targets.sources import Wanted, read_targets
from schemas.errors import UserError
from tests.encoded import encode

Capture = pytest.CaptureFixture[str]
KEYS = {
    "bytes_per_image",
    "fixed_bytes",
    "feature_cosine_min",
    "feature_cosine_mean",
    "attention_kl_mean",
    "attention_kl_max",
    "loss_relative_error",
    "gradient_cosine",
}


def fidelity(capsys: Capture, store: Store, *argv: str) -> dict[str, Any]:
    assert main([store.url, "--fidelity", "6", "--json", *argv]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    found: dict[str, Any] = json.loads(line)
    assert found.keys() >= KEYS
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fidelity")


@pytest.fixture(scope="module")
def store_of(folder: Path) -> Callable[..., Store]:
    made: dict[str, Store] = {}

    def make(cut: str, codec: str, **options: Any) -> Store:
        name = f"{cut}-{codec}"
        if name not in made:
            made[name] = encode(folder / name, cut=cut, codec=codec, **options)
        return made[name]

    return make


@pytest.mark.parametrize("cut", ["maps", "qk", "activations", "image"])
def test_exact_stores_are_found_exact(
    store_of: Callable[..., Store], cut: str, capsys: Capture
) -> None:
    store = store_of(cut, "float32")
    found = fidelity(capsys, store)
    assert found["images"] == 6
    assert found["feature_cosine_min"] > 1 - 1e-6
    assert found["attention_kl_max"] < 1e-6
    assert found["loss_relative_error"] < 1e-5
    assert found["gradient_cosine"] > 1 - 1e-6
    files = (
        p.stat().st_size for s in ("latents", cut, "class") for p in Path(store.root, s).iterdir()
    )
    assert found["bytes_per_image"] == pytest.approx(sum(files) / 8)
    assert isinstance(found["fixed_bytes"], int)


@pytest.mark.parametrize("cut", ["maps", "qk", "activations"])
def test_coarser_codecs_are_found_coarser(
    store_of: Callable[..., Store], cut: str, capsys: Capture
) -> None:
    faithful, small = (fidelity(capsys, store_of(cut, codec)) for codec in ("faithful", "small"))
    assert 1e-8 < faithful["attention_kl_mean"] < 2e-4
    assert faithful["attention_kl_mean"] < small["attention_kl_mean"] < 1e-3
    assert 0.9999 < faithful["gradient_cosine"] < 1
    assert small["gradient_cosine"] < faithful["gradient_cosine"]
    assert small["feature_cosine_min"] < faithful["feature_cosine_min"]
    assert small["bytes_per_image"] < faithful["bytes_per_image"]
    assert faithful["layers"].keys() == {"2", "3", "4", "5"}


def test_wrong_numbers_in_a_store_are_noticed(folder: Path, capsys: Capture) -> None:
    """A store made by another teacher that claims to be the demo's."""
    other = encode(folder / "other", teacher={"weights": "random"})
    demo = encode(folder / "demo")
    teacher = demo.manifest.streams["maps"].model_dump()["teacher"]
    path = Path(other.root, "manifest.json")
    values = json.loads(path.read_text())
    values["streams"]["maps"]["teacher"] = teacher
    path.write_text(json.dumps(values))
    found = fidelity(capsys, other)
    assert found["attention_kl_mean"] > 0.01
    assert found["feature_cosine_mean"] < 0.5
    assert found["gradient_cosine"] < 0.99


def test_other_weights_are_refused_and_copies_are_not(
    store_of: Callable[..., Store], folder: Path, capsys: Capture
) -> None:
    store = store_of("maps", "faithful")
    copy, changed = folder / "copy.safetensors", folder / "changed.safetensors"
    state = load_file(DEMO_TEACHER)
    save_file(state, copy)
    assert fidelity(capsys, store, "--teacher.weights", str(copy))["images"] == 6
    state["norm.weight"][0] += 1
    save_file(state, changed)
    with pytest.raises(UserError, match=r"are not those of the store: SHA-256 \w+") as error:
        main([store.url, "--fidelity", "2", "--teacher.weights", str(changed)])
    assert "\n" not in str(error.value)


def test_images_come_from_the_source_and_a_lost_one_is_named(folder: Path, capsys: Capture) -> None:
    source = folder / "images"
    for item in list_digits().items[:8]:
        path = source / f"class{item.label}" / item.path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(read_digit(item))
    store = encode(folder / "from-source", dataset="folder", source=str(source))
    assert fidelity(capsys, store)["attention_kl_mean"] < 2e-4
    moved = folder / "moved"
    source.rename(moved)
    with pytest.raises(UserError, match="--source"):
        main([store.url, "--fidelity", "2"])
    assert fidelity(capsys, store, "--source", str(moved))["images"] == 6
    for path in moved.rglob("*.png"):
        path.rename(path.with_name(f"other-{path.name}"))
    with pytest.raises(UserError, match="has no image 'class"):
        main([store.url, "--fidelity", "2", "--source", str(moved)])


def test_the_page_has_every_layer(store_of: Callable[..., Store], capsys: Capture) -> None:
    assert main([store_of("activations", "faithful").url, "--fidelity", "3"]) == 0
    page = capsys.readouterr().out
    for text in ("layer 2", "layer 5", "gradient cosine", "over 3 images", "outside the shards"):
        assert text in page
    assert re.search(
        r"mean time [\d.]+ ms to read the stream, [\d.]+ ms to compute its targets", page
    )
    assert re.search(r"all layers +attention KL mean \S+ nats per row, largest row \S+ nats", page)


def test_divergence_of_rows() -> None:
    p = torch.softmax(torch.randn(3, 5, 7, dtype=torch.float64), -1)
    q = torch.softmax(torch.randn(3, 5, 7, dtype=torch.float64), -1)
    expected = (p * (p.log() - q.log())).sum(-1)
    torch.testing.assert_close(kl_of_rows(p, q), expected, rtol=1e-6, atol=1e-9)
    assert kl_of_rows(p, p).abs().max() < 1e-12
    one_hot = torch.eye(4)
    assert kl_of_rows(one_hot, one_hot).abs().max() == 0
    assert np.isfinite(float(kl_of_rows(torch.full((4, 4), 0.25), one_hot).max()))


@pytest.mark.parametrize("cut", ["activations", "qk", "maps"])
def test_real_images_through_a_teacher_of_published_size(
    shared: Path, tmp_path: Path, capsys: Capture, cut: str
) -> None:
    """DINOv2-S at random, with the logits of a trained model, on ImageNet's own pixels."""
    store = encode(
        tmp_path / "store",
        samples=3,
        dataset="imagenet",
        source=str(shared / "data" / "imagenet_sample"),
        resolution=256,
        teacher={
            "weights": "random",
            "model_args": {"patch_size": 14, "embed_dim": 384, "depth": 12, "num_heads": 6},
            "image_size": None,
        },
        cut=cut,
        layers=(8, 9, 10, 11),
    )
    found = fidelity(capsys, store)
    assert found["images"] == 3
    assert found["attention_kl_mean"] < 2e-4
    assert found["feature_cosine_mean"] > 0.9999
    assert found["gradient_cosine"] > 0.9999
    if cut == "activations":
        in_float32 = 4 * 257 * 384
        assert store.index().bytes_per_stream["activations"] / 3 < in_float32 / 4


def recipe(path: Path, **alignment: Any) -> str:
    """A config that the demo's stores can train."""
    student = {"depth": 3, "width": 24, "heads": 6, "latent_size": 8, "num_classes": 10}
    values = {
        "student": {"model": "SiT-S/1", **student},
        "alignment": {
            "feature_depth": 2,
            "student_layers": [1, 2],
            "teacher_layers": [5, 3],
            "projector_width": 16,
            **alignment,
        },
    }
    path.write_text(yaml.safe_dump(values))
    return str(path)


def spatial(strength: float) -> dict[str, Any]:
    return {
        "attention_weight": 0,
        "projector": "conv",
        "projector_kernel": 3,
        "normalisation": "spatial",
        "normalisation_strength": strength,
    }


def test_a_configs_own_targets_and_losses_are_measured(
    store_of: Callable[..., Store], tmp_path: Path, capsys: Capture
) -> None:
    store = store_of("maps", "small")
    plain, feature = recipe(tmp_path / "a.yaml"), recipe(tmp_path / "b.yaml", attention_weight=0)
    found = fidelity_of(capsys, store, plain)["alignment"]
    assert found["layers"].keys() == {"5", "3"}
    assert 1e-8 < found["attention_kl_mean"] < 1e-3
    assert 0.99 < found["gradient_cosine"] < 1
    alone = fidelity_of(capsys, store, feature)["alignment"]
    assert (alone["layers"], alone["attention_kl_mean"]) == ({}, None)
    assert alone["attention_loss_relative_error"] is None
    assert alone["feature_relative_error"] == found["feature_relative_error"]


def test_errors_are_those_of_normalised_targets(
    store_of: Callable[..., Store], tmp_path: Path, capsys: Capture
) -> None:
    """Computed again by the formula of iREPA, from the teacher and from the stored features."""
    store = store_of("maps", "small")
    config = recipe(tmp_path / "c.yaml", **spatial(0.6))
    found = fidelity_of(capsys, store, config)["alignment"]
    plain = recipe(tmp_path / "d.yaml", attention_weight=0)
    raw = fidelity_of(capsys, store, plain)["alignment"]
    rows = np.unique(np.linspace(0, 7, 6).round().astype(int))
    stored = read_targets(store, np.zeros_like(rows), rows, Wanted(True, (), 1)).features
    teacher = open_teacher(store, "maps", None)
    images = torch.from_numpy(SourceImages(store, None)([0] * len(rows), rows.tolist()))
    exact = teacher(images.permute(0, 3, 1, 2)).features
    assert stored is not None
    one, other = (
        (x - 0.6 * x.mean(1, keepdim=True)) / (x.std(1, keepdim=True) + 1e-6)
        for x in (exact.double(), stored.double())
    )
    expected = float((other - one).norm() / one.norm())
    assert found["feature_relative_error"] == pytest.approx(expected, rel=1e-3)
    expected = float((stored - exact).norm() / exact.norm())
    assert raw["feature_relative_error"] == pytest.approx(expected, rel=1e-3)
    assert found["feature_cosine_mean"] < raw["feature_cosine_mean"]


def fidelity_of(capsys: Capture, store: Store, config: str) -> dict[str, Any]:
    assert main([store.url, "--fidelity", "6", "--config", config, "--json"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    found: dict[str, Any] = json.loads(line)
    return found


def test_every_cut_takes_a_config_and_streams_are_named(
    store_of: Callable[..., Store], tmp_path: Path, capsys: Capture
) -> None:
    other = {"feature_weight": 0.1, "attention_weight": 0, "feature_depth": 1, "target": "unnormed"}
    config = recipe(tmp_path / "e.yaml", **spatial(0.8), others=[other])
    assert main([store_of("image", "float32").url, "--fidelity", "3", f"--config={config}"]) == 0
    page = capsys.readouterr().out
    assert "alignment: fidelity of cut 'image' over 3 images" in page
    assert "alignment.others.0: fidelity of cut 'image'" in page
    assert "relative error" in page
    assert "attention KL" not in page


def test_a_store_without_attention_is_measured(folder: Path, capsys: Capture) -> None:
    store = encode(folder / "none", layers="none", codec="float32")
    found = fidelity(capsys, store)
    assert found["layers"] == {}
    assert found["attention_kl_mean"] is None
    assert found["feature_relative_error"] < 1e-6
    assert found["gradient_cosine"] > 1 - 1e-6


def test_configs_that_do_not_fit_are_refused(
    store_of: Callable[..., Store], tmp_path: Path
) -> None:
    store = store_of("maps", "small")
    wrong = recipe(tmp_path / "f.yaml", teacher_layers=[0, 3])
    with pytest.raises(UserError, match="asks for teacher layer 0"):
        main([store.url, "--fidelity", "2", "--config", wrong])
    vanilla = recipe(tmp_path / "g.yaml", attention_weight=0, feature_weight=0)
    with pytest.raises(UserError, match="no alignment"):
        main([store.url, "--fidelity", "2", "--config", vanilla])
    with pytest.raises(UserError, match="goes with --fidelity"):
        main([store.url, "--recipe", vanilla])
