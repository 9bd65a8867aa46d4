"""Options of the demo, which replaces its folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs import demo
from schemas.errors import UserError


@pytest.mark.parametrize("argv", [["--help"], ["--steps", "3"], ["more"]])
def test_help_and_unknown_options_leave_the_last_demo_alone(
    argv: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "samples.png").write_bytes(b"of the last demo")
    monkeypatch.setattr(demo, "RUN", tmp_path)
    with pytest.raises((UserError, SystemExit)):
        demo.main(argv)
    assert (tmp_path / "samples.png").exists()
