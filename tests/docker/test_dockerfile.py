"""Lint of the Dockerfile: what a build needs exists, and what it leaves is not root's."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILE = ROOT / "docker" / "Dockerfile"
KNOWN = {"FROM", "ARG", "ENV", "RUN", "COPY", "WORKDIR", "USER", "CMD", "ENTRYPOINT", "LABEL"}


def instructions(text: str) -> list[tuple[str, str]]:
    """(name, arguments) of each instruction, with continued lines joined."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    found = [line.split(maxsplit=1) for line in joined.splitlines() if line.strip()]
    return [(words[0], words[1] if len(words) > 1 else "") for words in found]


def problems(text: str) -> list[str]:
    steps = instructions(text)
    found = [f"unknown instruction {name}" for name, _ in steps if name not in KNOWN]
    for name, words in steps:
        if name == "FROM" and not words.startswith("$") and not re.search(r":[\w.-]+", words):
            found.append(f"base without a tag: {words}")
        if name == "COPY":
            *sources, _ = words.split()
            found += [f"no such file: {s}" for s in sources if not (ROOT / s).exists()]
        if name == "RUN" and "apt-get install" in words:
            missing = [w for w in ("--yes", "--no-install-recommends") if w not in words]
            found += [f"apt-get install without {word}" for word in missing]
            if "rm -rf /var/lib/apt/lists" not in words:
                found.append("apt's lists stay in the layer")
        if name == "RUN" and "pip install" in words and "--constraint" not in words:
            found.append("pip install without the pinned versions")
    users = [words for name, words in steps if name == "USER"]
    if not users or not users[-1].isdigit() or users[-1] == "0":
        found.append("the last USER is not a number other than root's")
    bases = re.findall(r"^ARG BASE=(\S+)", text, re.MULTILINE)
    if "FROM ${BASE}" in text and (len(bases) != 1 or ":" not in bases[0]):
        found.append("ARG BASE without a tagged default")
    return found


def test_the_dockerfile_is_sound() -> None:
    assert problems(FILE.read_text()) == []


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("USER 10001", "USER root"),
        ("USER 10001", "USER 0"),
        ("USER 10001\n", ""),
        ("COPY schemas schemas", "COPY schema schemas"),
        (" --no-install-recommends", ""),
        ("WORKDIR", "WORKDIRS"),
        (":13.0.1-base-ubuntu24.04", ""),
        ("--constraint constraints.txt .", "."),
        ("&& rm -rf /var/lib/apt/lists/*", ""),
    ],
)
def test_a_fault_is_found(old: str, new: str) -> None:
    text = FILE.read_text()
    assert old in text
    assert problems(text.replace(old, new, 1))
