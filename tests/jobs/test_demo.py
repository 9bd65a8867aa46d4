"""Options of the demo, which replaces its folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs import demo
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
