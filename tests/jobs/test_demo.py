"""Options of the demo, which replaces its folder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from jobs import demo
from pipeline.pretrain.options import NAMES
from schemas.errors import UserError


@pytest.mark.parametrize("argv", [["--help"], ["--steps", "3"], ["more"], ["--recipe", "nothing"]])
def test_help_and_unknown_options_leave_the_last_demo_alone(
    argv: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "samples.png").write_bytes(b"of the last demo")
    monkeypatch.setattr(demo, "RUN", tmp_path)
    with pytest.raises((UserError, SystemExit)):
        demo.main(argv)
    assert (tmp_path / "samples.png").exists()


@pytest.mark.parametrize("recipe", ["haste", "repa", "irepa", "reg", "reg_haste"])
def test_every_recipe_is_a_config(recipe: str) -> None:
    config = demo._run_config(recipe)
    assert config.name == ("demo" if recipe == "haste" else f"demo_{recipe}")
    assert (config.student.class_token is not None) == recipe.startswith("reg")


def test_a_recipe_of_any_name_is_written_to_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "own.yaml").write_text("name: another\n")
    monkeypatch.setattr(demo, "CONFIGS", tmp_path)
    assert demo._run_config("own").name == "demo_own"


def test_an_unknown_recipe_is_refused() -> None:
    with pytest.raises(UserError, match=r"--recipe more is not one of haste, .*reg, reg_haste"):
        demo._run_config("more")


def test_the_text_demo_is_a_recipe_of_its_own() -> None:
    config = demo._run_config("text")
    assert (config.name, config.student.family) == ("demo_text", "MMDiT")
    with pytest.raises(UserError, match="--recipe repa is for --task class"):
        demo.main(["--task", "text", "--recipe", "repa"])
    with pytest.raises(UserError, match=r"more is not one of haste, irepa, reg, reg_haste, repa$"):
        demo._run_config("more")


def test_captions_of_the_text_demo_and_their_encoder(tmp_path: Path) -> None:
    """Every digit has its captions, and the encoder separates the digits' names."""
    pytest.importorskip("transformers", reason="the extra `text` is not installed")
    from jobs.pretrain.text_encoder import train_text_encoder
    from jobs.text_demo import DigitJudge, write_source
    from pipeline.datasets import list_images
    from pipeline.datasets.digits import digits_images
    from pipeline.text_encoders import TextEncoder
    from schemas.extract import ExtractConfig, TextConfig

    judge = DigitJudge()
    assert train_text_encoder(judge.prototypes(), tmp_path / "encoder") == 1
    encoder = TextEncoder(TextConfig(encoder=str(tmp_path / "encoder")))
    assert (encoder.tokenizer.max_tokens, encoder.width) == (8, 64)
    states = encoder([f"a handwritten {name}" for name in NAMES]).flatten(1)
    distances = torch.cdist(states, states) + 1e3 * torch.eye(10)
    assert distances.min() > 0.3 * states.std() * states.shape[1] ** 0.5
    write_source(tmp_path / "source")
    config = ExtractConfig(
        dataset="folder",
        source=str(tmp_path / "source"),
        captions=str(tmp_path / "source" / "captions.jsonl"),
    )
    images, labels = digits_images(32)
    by_key = {item.key: item.captions for item in list_images(config).items}
    assert len(by_key) == len(labels)
    for number, label in enumerate(labels.tolist()):
        name = NAMES[label]
        expected = (f"a handwritten {name}", f"the digit {name}", name)
        assert by_key[f"digit-{number:04d}"] == expected
    real = torch.from_numpy(images[:100]).permute(0, 3, 1, 2)
    right = torch.from_numpy(labels[:100])
    assert judge.agreement(real, right) > 0.9
    assert judge.agreement(real, (right + 1) % 10) < 0.1


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_pictures_of_the_text_demo_follow_their_captions(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """The whole demo, with two Ray workers."""
    pytest.importorskip("transformers", reason="the extra `text` is not installed")
    monkeypatch.setattr(demo, "RUN", tmp_path / "demo")
    monkeypatch.setattr(demo, "ROOT", tmp_path)
    assert demo.main(["--task", "text"]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("agreement: ")
    assert int(line.split()[1].rstrip("%")) >= 80  # a tenth by chance
    assert (tmp_path / "demo_text" / "report.html").exists()
