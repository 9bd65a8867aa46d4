"""Short forms of numbers."""

from __future__ import annotations

import pytest

from pipeline.text import describe_bytes, describe_hours


@pytest.mark.parametrize(
    ("hours", "text"),
    [
        (0.0, "0 s"),
        (9.873e-05, "0.355 s"),
        (0.02, "1.2 min"),
        (0.0151, "54.4 s"),
        (1.0, "1 h"),
        (36.04, "36 h"),
        (4321.0, "4.32k h"),
    ],
)
def test_durations_have_a_unit(hours: float, text: str) -> None:
    assert describe_hours(hours) == text


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (999.7, "1 kB"), (1_234_567, "1.23 MB")]
)
def test_bytes_have_a_unit(count: float, text: str) -> None:
    assert describe_bytes(count) == text
