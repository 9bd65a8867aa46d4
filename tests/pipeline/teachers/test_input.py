"""The teacher's input: mean, std and interpolation, from a model's name or from options."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from pipeline.cli.options import parse_options
from pipeline.extract.hints import report_statistics
from pipeline.inspect.suggest_extraction import _teacher as suggested
from pipeline.inspect.summary import _describe_teacher
from pipeline.teachers import Teacher
from pipeline.teachers.manifest_check import create_meta_teacher, teacher_config
from schemas.errors import UserError
from schemas.extract import ExtractConfig, TeacherConfig
from schemas.networks import TeacherInfo
from tests.stores import random_manifest

MODEL = "vit_small_patch16_224"  # timm's own weights were trained with 0.5 and 0.5
SMALL = {"embed_dim": 48, "depth": 2, "num_heads": 2}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def config(**options: Any) -> TeacherConfig:
    values = {"model": MODEL, "weights": "random", "image_size": 32, "model_args": SMALL}
    return TeacherConfig.model_validate({**values, **options})


def make(**options: Any) -> Teacher:
    return Teacher(config(**options), resolution=48, layers=(1,))


@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
@pytest.mark.parametrize("antialias", [False, True])
def test_input_is_that_of_the_options(mode: str, antialias: bool) -> None:
    images = torch.randint(0, 256, (2, 3, 48, 48), dtype=torch.uint8)
    resize = mode + ("_antialias" if antialias else "")
    teacher = make(mean=MEAN, std=STD, resize=resize)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    expected = F.interpolate((images / 255 - mean) / std, (32, 32), mode=mode, antialias=antialias)
    torch.testing.assert_close(teacher.preprocess(images), expected)


def test_default_is_the_models_name_and_writes_no_new_key() -> None:
    info = make().info()
    assert (info.mean, info.std) == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    assert not {"statistics_of", "resize"} & info.model_dump().keys()
    same = make(mean=(0.5, 0.5, 0.5)).info()
    assert same == info
    assert teacher_config(info).mean is None


def test_options_are_in_the_manifest_and_rebuild_the_teacher() -> None:
    teacher = make(mean=MEAN, std=STD, resize="bilinear")
    info = TeacherInfo.model_validate_json(teacher.info().model_dump_json())
    assert (info.mean, info.std, info.resize, info.statistics_of) == (
        *(MEAN, STD),
        *("bilinear", "options"),
    )
    create_meta_teacher(info, 48, "manifest")
    again = Teacher(teacher_config(info), resolution=48, layers=(1,))
    images = torch.randint(0, 256, (1, 3, 48, 48), dtype=torch.uint8)
    assert torch.equal(again.preprocess(images), teacher.preprocess(images))
    changed = info.model_copy(update={"statistics_of": "model"})
    with pytest.raises(UserError, match=r"manifest\.mean is .* but that of 'vit_small"):
        create_meta_teacher(changed, 48, "manifest")


def test_one_of_the_two_is_enough() -> None:
    info = make(mean=MEAN).info()
    assert (info.mean, info.std, info.statistics_of) == (MEAN, (0.5, 0.5, 0.5), "options")


def test_inspection_shows_it_and_suggests_the_options() -> None:
    stream = random_manifest(6, 3).teacher_streams["maps"]
    info = make(mean=MEAN, std=STD, resize="bicubic_antialias").info()
    stream = stream.model_copy(update={"teacher": info})
    text = "\n".join(_describe_teacher(stream))
    assert "32 px, bicubic_antialias; mean 0.485, 0.456, 0.406, std 0.229, 0.224, 0.225" in text
    argv = list(suggested(stream))
    parsed = parse_options(ExtractConfig, argv, command="c", about="a").teacher
    assert (parsed.mean, parsed.std, parsed.resize) == (MEAN, STD, "bicubic_antialias")


@pytest.mark.parametrize(
    "values", [{"mean": (123.675, 116.28, 103.53)}, {"std": (0, 1, 1)}, {"mean": (0.5,)}]
)
def test_numbers_of_another_range_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"mean|std"):
        config(**values)


def test_a_file_is_reported_with_the_statistics_that_were_taken(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("pipeline"), "propagate", True)
    path = str(tmp_path / "weights.pth")
    torch.save(make().vit.state_dict(), path)

    def logged(**options: Any) -> tuple[str, str]:
        caplog.clear()
        caplog.set_level(logging.INFO)
        teacher = config(**{"weights": path, **options})
        info = Teacher(teacher, resolution=48, layers=(1,)).info()
        report_statistics(ExtractConfig(teacher=teacher), info)
        return (caplog.records[-1].levelname, caplog.text) if caplog.records else ("", "")

    level, text = logged()
    assert level == "WARNING"
    assert "mean 0.5, 0.5, 0.5 and std 0.5, 0.5, 0.5, of the name 'vit_small_patch16_224'" in text
    assert "--teacher.mean and --teacher.std" in text
    level, text = logged(mean=MEAN, std=STD)
    assert level == "INFO"
    assert "mean 0.485, 0.456, 0.406 and std 0.229, 0.224, 0.225, of options" in text
    assert logged(model="vit_small_patch16_224.dino")[0] == "INFO"  # ImageNet's, as its file
    assert logged(weights="random") == ("", "")
