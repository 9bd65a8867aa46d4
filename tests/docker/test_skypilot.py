"""SkyPilot's file: its fields by SkyPilot's own schemas, its commands by this project's options."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from pipeline.cli.options import parse_options
from pipeline.cli.yaml12 import load_yaml
from schemas.extract import PRESETS, ExtractConfig
from schemas.run import RunConfig

ROOT = Path(__file__).parents[2]
TASK: dict[str, Any] = load_yaml((ROOT / "docker/skypilot/haste.yaml").read_text(encoding="utf-8"))
PYTHON = os.environ.get("HASTE_SKYPILOT_PYTHON", sys.executable)
"""A Python with the package skypilot, whose many dependencies this project does without."""
PRINT = """
import json
from sky.utils import schemas
print(json.dumps([getattr(schemas, f"get_{name}_schema")() for name in
                  ("task", "resources", "storage")]))
"""


@cache
def schemas() -> list[dict[str, Any]]:
    done = subprocess.run([PYTHON, "-c", PRINT], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("no package skypilot: name a Python that has it in HASTE_SKYPILOT_PYTHON")
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def problems(task: dict[str, Any]) -> list[str]:
    parts = [task, task["resources"], task["file_mounts"]["/images"]]
    return [
        error.message
        for schema, part in zip(schemas(), parts, strict=True)
        for error in jsonschema.Draft202012Validator(schema).iter_errors(part)
    ]


def test_skypilot_accepts() -> None:
    assert problems(TASK) == []


@pytest.mark.parametrize(
    "change",
    [
        {"number_of_nodes": 2},
        {"num_nodes": "two"},
        {"resources": {**TASK["resources"], "spot": True}},
        {"file_mounts": {"/images": {"source": "s3://a", "modes": "MOUNT"}}},
    ],
    ids=str,
)
def test_a_bad_file_is_found(change: dict[str, Any]) -> None:
    assert problems({**TASK, **change})


@pytest.mark.parametrize("part", ["setup", "run"])
def test_bash_parses(part: str) -> None:
    done = subprocess.run(["bash", "-n"], input=TASK[part], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def commands() -> list[list[str]]:
    """Words of both commands, with the variables of two nodes of eight GPUs."""
    script = re.sub(r"\$\(\(.*?\)\)", "16", TASK["run"]).replace("$BUCKET", "bucket")
    lines = script.replace("\\\n", " ").splitlines()
    return [shlex.split(line) for line in lines if line.strip().startswith("python ")]


def test_options_exist() -> None:
    extract, train = commands()
    assert extract[:3] == ["python", "-m", "pipeline.extract"]
    presets: dict[str, Any] = {"presets": PRESETS, "preset_key": "dataset"}
    stored = parse_options(ExtractConfig, extract[3:], command="", about="", **presets)
    assert stored.source is not None
    assert stored.source.split("/")[1] == next(iter(TASK["file_mounts"])).strip("/")
    assert (ROOT / train[1]).is_file()
    words = [str(ROOT / word) if word.endswith(".yaml") else word for word in train[2:]]
    config = parse_options(RunConfig, words, command="", about="")
    assert config.store == stored.store
    assert config.workers.count == 16
    assert config.data.cache_gb < TASK["resources"]["disk_size"]
