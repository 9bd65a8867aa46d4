"""Networks trained on the images of an extraction before it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.autoencoders import Autoencoder
from pipeline.pretrain.networks import _common, train_missing, warn_of_blur, warn_of_weak_teacher
from pipeline.teachers import Teacher
from schemas.errors import UserError
from schemas.extract import ExtractConfig
from schemas.validation import validate

SMALL = {"patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2}


def config_of(tmp_path: Path, **changes: Any) -> ExtractConfig:
    options: dict[str, Any] = {
        "dataset": "folder",
        "source": str(tmp_path / "images"),
        "resolution": 16,
        "teacher": {
            "model": "vit_small_patch14_dinov2.lvd142m",
            "weights": str(tmp_path / "n" / "teacher.safetensors"),
            "image_size": 16,
            "model_args": SMALL,
        },
        "autoencoder": str(tmp_path / "n" / "autoencoder"),
        "pretrain": {"teacher_steps": 2, "autoencoder_steps": 2, "widths": [8, 8], "batch_size": 4},
    }
    return validate(ExtractConfig, {**options, **changes}, where="test")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    generator = np.random.default_rng(0)
    for n in range(6):
        path = tmp_path / "images" / "ab"[n % 2] / f"{n}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (16, 16, 3), np.uint8)).save(path)
    (tmp_path / "images" / "a" / "bad.png").write_bytes(b"x")
    return tmp_path / "images"


def test_both_networks_are_trained_once_and_can_be_loaded(images: Path, tmp_path: Path) -> None:
    config = config_of(tmp_path)
    train_missing(config)
    weights = Path(config.teacher.weights)
    teacher = Teacher(config.teacher, resolution=16, layers=(0, 1))
    assert teacher.vit.embed_dim == 24
    autoencoder = Autoencoder(config.autoencoder)
    mean, _ = autoencoder.encode(torch.zeros(1, 3, 16, 16, dtype=torch.uint8))
    assert mean.shape == (1, 4, 8, 8)
    report = json.loads(weights.with_suffix(".json").read_text())
    assert report["results"]["images"] == 6
    assert set(report["results"]["knn"]) == {"class token", "mean patch", "raw pixels"}
    before = weights.stat().st_mtime_ns
    train_missing(config)
    assert weights.stat().st_mtime_ns == before
    weights.unlink()
    train_missing(config)
    again = Teacher(config.teacher, resolution=16, layers=(0, 1))
    first, second = teacher.vit.state_dict(), again.vit.state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_weak_networks_are_named_before_hours_are_spent_on_them(
    caplog: pytest.LogCaptureFixture,
) -> None:
    knn = {"class token": 0.27, "mean patch": 0.26, "raw pixels": 0.32}
    warn_of_weak_teacher(knn | {"mean patch": 0.33})
    warn_of_blur(20.1)
    assert not caplog.messages
    warn_of_weak_teacher(knn)
    warn_of_blur(13.2)
    teacher, autoencoder = caplog.messages
    assert teacher.startswith("this teacher knows no more of the classes than raw pixels do")
    assert autoencoder.startswith("below 20 dB pictures are blurred")


def test_networks_of_other_options_are_refused(images: Path, tmp_path: Path) -> None:
    train_missing(config_of(tmp_path))
    pretrain = {"teacher_steps": 3, "autoencoder_steps": 2, "widths": [8, 8], "batch_size": 4}
    with pytest.raises(UserError, match="trained with another steps: remove it"):
        train_missing(config_of(tmp_path, pretrain=pretrain))


def test_weights_that_are_not_a_path_are_refused(images: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="pretrain needs --autoencoder to be the path of a folder"):
        train_missing(config_of(tmp_path, autoencoder="demo"))
    teacher = {"model": "vit_small_patch14_dinov2", "weights": "hub"}
    with pytest.raises(UserError, match=r"pretrain needs --teacher.weights to be a path"):
        train_missing(config_of(tmp_path, teacher=teacher))


def test_a_source_without_images_is_refused(tmp_path: Path) -> None:
    (tmp_path / "images" / "a").mkdir(parents=True)
    (tmp_path / "images" / "a" / "1.png").write_bytes(b"x")
    with pytest.raises(UserError, match="none of 1 files is an image"):
        train_missing(config_of(tmp_path))


def test_credentials_of_the_source_are_not_in_reports(tmp_path: Path) -> None:
    config = config_of(tmp_path, source="s3://user:hidden-word@bucket/images")
    assert config.pretrain is not None
    assert _common(config, config.pretrain)["source"] == "s3://bucket/images"
