"""Lint of the Dockerfile: what a build needs exists, and what it leaves is not root's.

The rules are those of hadolint that concern these instructions, by their numbers.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tempfile
import urllib.request
from itertools import groupby
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILE = ROOT / "docker" / "Dockerfile"
ENTRY = ROOT / "docker" / "haste"
KNOWN = {"FROM", "ARG", "ENV", "RUN", "COPY", "WORKDIR", "USER", "CMD", "ENTRYPOINT", "LABEL"}
TARGETS = {"cpu", "cuda"}
CPU_INDEX = "https://download.pytorch.org/whl/cpu"

Steps = list[tuple[str, str]]


def instructions(text: str) -> Steps:
    """(name, arguments) of each instruction, with continued lines joined."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    found = [line.split(maxsplit=1) for line in joined.splitlines() if line.strip()]
    return [(words[0], words[1] if len(words) > 1 else "") for words in found]


def stages(text: str) -> dict[str, Steps]:
    """Steps of each stage by its name, with those of the stages below it."""
    found: dict[str, Steps] = {"": []}
    name = ""
    for step in instructions(text):
        if step[0] == "FROM":
            base, _, name = step[1].partition(" AS ")
            found[name] = [*found.get(base, [])]
        found[name].append(step)
    return found


def problems(text: str) -> list[str]:
    steps = instructions(text)
    found = [f"unknown instruction {name}" for name, _ in steps if name not in KNOWN]  # DL3020
    names = [words.partition(" AS ")[2] for name, words in steps if name == "FROM"]
    if len(names) != len(set(names)):
        found.append("two stages of one name")  # DL3024
    found += [f"no stage {name}" for name in sorted(TARGETS - set(names))]
    if names[-1] != "cuda":
        found.append("the last stage, which is the default, is not cuda")
    for name, words in steps:
        base = words.partition(" AS ")[0]
        if name == "FROM" and base not in names and not re.fullmatch(r"\$.*|.*:[\w.-]+", base):
            found.append(f"base without a tag: {base}")  # DL3006
        if name == "COPY":
            *sources, _ = words.split()
            found += [f"no such file: {s}" for s in sources if not (ROOT / s).exists()]
        if name == "RUN":
            found += _problems_of_command(words)
        if name in {"CMD", "ENTRYPOINT"} and not words.startswith("["):
            found.append(f"{name} in a shell, which signals do not pass")  # DL3025
        if name == "WORKDIR" and not words.startswith("/"):
            found.append(f"relative folder {words}")  # DL3000
    for target in TARGETS & set(names):
        found += _problems_of_target(stages(text)[target])
    bases = re.findall(r"^ARG BASE=(\S+)", text, re.MULTILINE)
    if len(bases) != 1 or ":" not in bases[0]:
        found.append("ARG BASE without a tagged default")
    return found


def _problems_of_command(words: str) -> list[str]:
    found = []
    if re.search(r"\b(sudo|cd)\s", words):
        found.append("cd or sudo in a step")  # DL3003, DL3004
    if "apt-get install" in words:
        options = ("--yes", "--no-install-recommends")  # DL3014, DL3015
        found += [f"apt-get install without {word}" for word in options if word not in words]
        if "rm -rf /var/lib/apt/lists" not in words:
            found.append("apt's lists stay in the layer")  # DL3009
        if "apt-get update" not in words:
            found.append("apt-get install without a list of its own step")
    if "pip install" in words and "--constraint" not in words:
        found.append("pip install without the pinned versions")  # DL3013
    return found


def _problems_of_target(steps: Steps) -> list[str]:
    users = [words for name, words in steps if name == "USER"]
    found = []
    if not users or not users[-1].isdigit() or users[-1] == "0":
        found.append("the last USER is not a number other than root's")  # DL3002
    if not any(name == "ENV" and "PIP_NO_CACHE_DIR=1" in words for name, words in steps):
        found.append("pip's cache stays in the layer")  # DL3042
    for name, group in groupby(sorted(name for name, _ in steps)):
        if name in {"CMD", "ENTRYPOINT"} and len(list(group)) != 1:
            found.append(f"several {name}")  # DL4003, DL4004
    return found


def test_the_dockerfile_is_sound() -> None:
    assert problems(FILE.read_text()) == []


def test_targets_differ_in_their_index_only() -> None:
    """Steps of one are those of the other, except for the default of pip's argument."""
    found = stages(FILE.read_text())
    cpu, cuda = ([step for step in found[name] if step[0] != "FROM"] for name in ("cpu", "cuda"))
    differ = [(one, other) for one, other in zip(cpu, cuda, strict=True) if one != other]
    index = "PIP_EXTRA_INDEX_URL="
    assert differ == [(("ARG", f"{index}{CPU_INDEX}"), ("ARG", index))]


def test_the_entry_knows_every_command(tmp_path: Path) -> None:
    """Words of its own are commands of this project; others, as KubeRay's, run as they are."""

    def run(*words: str) -> str:
        (tmp_path / "python").write_text('#!/bin/sh\necho "$@"\n')
        (tmp_path / "python").chmod(0o755)
        path = f"{tmp_path}:/usr/bin:/bin"
        command = [str(ENTRY), *words]
        done = subprocess.run(
            command, env={"PATH": path}, capture_output=True, text=True, check=True
        )
        return done.stdout

    listed = run("help").splitlines()[1].removeprefix("commands: ").split(", ")
    assert run() == run("--help") == run("help")
    for name in listed:
        first, *rest = run(name, "--store", "a b").split()
        file = rest[0] if first == "-m" else first.removeprefix("/opt/haste/")
        path = ROOT / file.replace(".", "/") / "__main__.py" if first == "-m" else ROOT / file
        assert path.is_file(), name
        assert rest[-3:] == ["--store", "a", "b"]
    assert run("echo", "ray start") == "ray start\n"
    assert {path.parent.name for path in ROOT.glob("pipeline/*/__main__.py")} - {"store"} <= {
        *listed
    }


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
        (" AS cpu", " AS cuda"),
        ("AS cuda", "AS gpu"),
        ("WORKDIR /opt/haste", "WORKDIR haste"),
        ('ENTRYPOINT ["haste"]', "ENTRYPOINT haste"),
        ('CMD ["help"]', 'CMD ["help"]\nCMD ["help"]'),
        ("PIP_NO_CACHE_DIR=1", "PIP_NO_CACHE=1"),
        ("RUN apt-get update", "RUN cd /tmp"),
        ("COPY pipeline", "ADD pipeline"),
    ],
)
def test_a_fault_is_found(old: str, new: str) -> None:
    text = FILE.read_text()
    assert old in text
    assert problems(text.replace(old, new, 1))


def call(*command: str) -> str:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
    return done.stdout


def reason_against_building() -> str | None:
    missing = [name for name in ("buildah", "debootstrap") if shutil.which(name) is None]
    if missing:
        return f"{', '.join(missing)}: not installed (apt-get install buildah debootstrap)"
    if os.geteuid() != 0:
        return "debootstrap and buildah in a chroot are for root"
    free = shutil.disk_usage(tempfile.gettempdir()).free
    return None if free > 12 << 30 else f"{free >> 30} GB are free, and the wheels need 12"


class Buildah:
    """Images in a folder. A context manager, which removes them."""

    def __init__(self, folder: Path) -> None:
        places = ["--root", str(folder / "storage"), "--runroot", str(folder / "run")]
        for driver in ("overlay", "vfs"):  # which works everywhere, and copies every layer
            self.command = ["buildah", *places, "--storage-driver", driver]
            done = subprocess.run([*self.command, "from", "scratch"], capture_output=True)
            if done.returncode == 0:
                return
        pytest.skip(f"buildah has no storage here: {done.stderr.decode()[-200:]}")

    def __call__(self, *words: str) -> str:
        return call(*self.command, *words)

    def __enter__(self) -> Buildah:
        return self

    def __exit__(self, *_: object) -> None:
        self("rm", "--all")
        self("rmi", "--all", "--force")


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_image_for_cpus_is_built_and_works(tmp_path: Path) -> None:
    """On a base made by debootstrap, because none can be pulled everywhere. The virtual environment
    is a volume, because a commit would keep its gigabytes in several copies."""
    reason = reason_against_building()
    if reason:
        pytest.skip(reason)
    base, venv = tmp_path / "base", tmp_path / "venv"
    venv.mkdir()
    call("debootstrap", "--variant=minbase", "bookworm", str(base))
    own = Path("/usr/local/share/ca-certificates")  # of this machine's network, where it has any
    shutil.copytree(own, base / own.relative_to("/"), dirs_exist_ok=True)
    with Buildah(tmp_path) as buildah:
        container = buildah("from", "scratch").strip()
        buildah("add", "--quiet", container, str(base), "/")
        buildah("commit", "--quiet", "--rm", container, "localhost/debian:bookworm")
        options = ["--isolation", "chroot", "--target", "cpu", "--volume", f"{venv}:/opt/venv"]
        options += ["--build-arg", "BASE=localhost/debian:bookworm", "--tag", "haste:cpu"]
        if not reachable(CPU_INDEX):  # the wheels of PyPI work on CPUs too, and are larger
            options += ["--build-arg", "PIP_EXTRA_INDEX_URL="]
        buildah("bud", *options, "--file", "docker/Dockerfile", ".")

        container = buildah("from", "haste:cpu").strip()
        mounts = ["--isolation", "chroot", "--volume", f"{venv}:/opt/venv:ro"]

        def inside(*words: str) -> str:
            # env: buildah 1.28 looks for the program itself on this machine's PATH, not the image's
            return buildah("run", *mounts, container, "--", "env", *words)

        assert inside("id", "-u").strip() == "10001"
        assert inside("python", "-m", "pipeline.extract", "--help").startswith("usage: ")
        assert "commands: quickstart, extract" in inside("haste")
        store = "/home/haste/store"
        words = ["--dataset", "demo", "--store", store, "--actors", "1"]
        assert "is complete: 1797 samples" in inside("haste", "extract", *words)
        assert inside("haste", "inspect", store).startswith(f"{store}: complete")
        shown = json.loads(buildah("inspect", "--type", "image", "haste:cpu"))
        assert shown["OCIv1"]["config"]["Entrypoint"] == ["haste"]
        assert shown["OCIv1"]["config"]["Cmd"] == ["help"]
        (image,) = json.loads(buildah("images", "--json", "haste:cpu"))
        parts = sorted(venv.glob("lib/python3*/site-packages/nvidia"))
        folders = call("du", "-sm", str(venv), *map(str, parts))
        print(f"image {image['size']}; its environment and CUDA's part of it, MB:\n{folders}")


def reachable(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=10).close()
    except OSError:
        return False
    return True
