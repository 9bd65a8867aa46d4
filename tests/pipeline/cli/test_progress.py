"""Progress where stderr is no terminal: lines, one a minute."""

from __future__ import annotations

import io
import logging
import re
import sys
import time

import pytest
from tqdm import tqdm

from pipeline.cli import progress
from pipeline.cli.progress import progress_bar, saying


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_lines_without_carriage_returns(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.2)
    with progress_bar(total=40, unit="image", desc="extract") as bar:
        for _ in range(40):
            time.sleep(0.02)
            bar.update(1)
            logging.getLogger("pipeline.test").info("a line of the log")
    text = capsys.readouterr().err
    assert "\r" not in text
    lines = [line for line in text.splitlines() if line.startswith("extract: ")]
    assert 3 <= len(lines) <= 8  # 0.8 s and more
    assert lines[0].startswith("extract: 0/40 images (0%)")
    assert lines[-1].startswith("extract: 40/40 images (100%)")
    assert len(text.splitlines()) == len(lines) + 40


def test_a_quick_command_prints_its_ends_only(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(progress_bar(range(1000), unit="batch", desc="sample")) == list(range(1000))
    assert len(capsys.readouterr().err.splitlines()) == 2


def test_lines_say_rate_time_left_and_time_taken(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    number = r"[\d.]+(e\+\d+)?"
    for unit, rate in (("image", f"{number} images/s"), ("B", f"{number} [kMG]?B/s")):
        with progress_bar(total=3, initial=1, unit=unit, desc="a") as bar:
            for _ in range(2):
                time.sleep(0.01)
                bar.update(1)
        many = "B" if unit == "B" else " images"
        first, second, last = capsys.readouterr().err.splitlines()
        assert first == f"a: 1/3{many} (33%)"
        assert re.fullmatch(rf"a: 2/3{many} \(67%\), {rate}, \d\d:\d\d left", second)
        assert re.fullmatch(rf"a: 3/3{many} \(100%\) in [\d.]+ s", last)


def test_an_error_leaves_the_last_state(capsys: pytest.CaptureFixture[str]) -> None:
    bar = progress_bar(total=5, desc="a")
    with pytest.raises(ValueError, match="broken"), bar:
        raise ValueError(f"broken after {bar.update(3)}")
    assert "a: 3/5" in capsys.readouterr().err


def test_a_bar_that_was_left_says_nothing_later(capsys: pytest.CaptureFixture[str]) -> None:
    bar = progress_bar(total=5, desc="a")
    bar.update(3)
    del bar
    assert capsys.readouterr().err.splitlines() == ["a: 0/5 its (0%)"]


def test_a_terminal_has_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with progress_bar(total=2) as bar:
        assert type(bar) is tqdm
    assert "\r" in terminal.getvalue()


def test_long_work_is_named_and_short_work_is_not(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(progress, "QUIET_SECONDS", 0.1)
    with saying("counting sheep"):
        deadline = time.monotonic() + 20
        while not caplog.messages and time.monotonic() < deadline:
            time.sleep(0.01)
    monkeypatch.setattr(progress, "QUIET_SECONDS", 60.0)
    with saying("counting fish"):
        pass
    assert caplog.messages == ["counting sheep"]
