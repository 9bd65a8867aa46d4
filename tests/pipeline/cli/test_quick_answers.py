"""Help and complaints that come before the packages that take seconds to import."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.bench.options import OPTIONS
from tests.commands import CommandServer

ROOT = Path(__file__).parents[3]
HEAVY = {"diffusers", "matplotlib", "pandas", "ray", "scipy", "sklearn", "timm", "torch"}
HEAVY |= {"torch_fidelity", "torchvision", "transformers", "zarr"}
MODULES = ["doctor", "extract", "extract --plan", "convert", "inspect", "quickstart", "report"]
FILES = ["train_haste.py", "train_haste.py --plan", "sample.py", "evaluate.py", "export.py"]
FILES += ["demo.py", "experiments/matrix.py", "experiments/page.py"]
FILES += ["pretrain/autoencoder.py", "pretrain/self_distill.py"]
MATRIX, CIFAR = "jobs/experiments/matrix.py", "jobs/experiments/cifar10.yaml"
IMAGES = f"{MATRIX} --config {CIFAR} --output {{0}} --source"
COMMANDS = [
    *(f"-m pipeline.{name}" for name in MODULES),
    *(f"jobs/{name}" for name in FILES),
    *(f"-m tests.bench {name}" for name in OPTIONS),
    *("-m tests.bench", "-m tests.faults", "-m tests.gpu", "-m tests.gpu checks"),
    "-m schemas.json_schema",
]


@pytest.fixture(scope="module")
def server() -> Iterator[CommandServer]:
    with CommandServer() as running:
        yield running


def run(server: CommandServer, command: str, *more: str, width: str = "80") -> tuple[int, str, str]:
    """Exit code, output and messages of a command that must import no package of ``HEAVY``."""
    ended = server.run([*command.split(), *more], COLUMNS=width)
    assert ended.packages & HEAVY == set()
    return ended.code, ended.out, ended.err.rstrip("\n")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_imports_nothing_heavy(command: str) -> None:
    """In a process that has imported nothing before."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *command.split(), "--help"],
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "80"},
        capture_output=True,
        text=True,
    )
    lines = done.stderr.splitlines()
    times = [line for line in lines if line.startswith("import time:")]
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in times}
    assert "schemas" in imported
    assert imported & HEAVY == set()
    page = done.stdout
    assert (done.returncode, lines) == (0, times)
    assert page.startswith("usage: ")
    assert command.split()[1 if command.startswith("-m") else 0] in page


def test_every_command_is_tried() -> None:
    """Files with a command, but for those that only tests and other commands start."""
    programs = {
        str(path.relative_to(ROOT))
        for folder in ("pipeline", "jobs", "schemas")
        for path in (ROOT / folder).rglob("*.py")
        if 'if __name__ == "__main__":' in path.read_text()
    }
    words = [command.removeprefix("-m ").split()[0] for command in COMMANDS]
    tried = {
        word if word.endswith(".py") else f"{word.replace('.', '/')}{end}"
        for word in words
        for end in (".py", "/__main__.py")
    }
    # one names its successor, the other is for readers, and imports torch at its head
    assert programs - tried == {"pipeline/store/__main__.py", "jobs/examples/plain_loop.py"}
    bench = (ROOT / "tests" / "bench" / "__main__.py").read_text()
    assert set(OPTIONS) == set(re.findall(r'^    "(\w+)": "', bench, re.MULTILINE))


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("-m pipeline.extract --sorce a", "unknown option --sorce (did you mean '--source'?)"),
        ("-m pipeline.extract --dataset folder --store {0}/s", "--source is missing"),
        ("-m pipeline.extract --dataset folder --source {0}/no --store {0}/s", "{0}/no"),
        ("-m pipeline.extract --dataset imagenet --source {0}/no --store {0}/s", "{0}/no"),
        ("-m pipeline.extract --dataset repa --source {0}/no --store {0}/s", "{0}/no"),
        ("-m pipeline.extract --dataset webdataset --source {0}/no --store {0}/s", "{0}/no"),
        ("-m pipeline.extract --source {0}", "--store is missing"),
        ("-m pipeline.extract --config {0}/broken.yaml", "not YAML"),
        ("-m pipeline.extract --plan --config {0}/no.yaml", "cannot read this config"),
        ("-m pipeline.convert {0}/no {0}/other", "{0}/no"),
        ("-m pipeline.convert {0}/no", "name two stores"),
        ("-m pipeline.inspect {0}/no", "{0}/no"),
        ("-m pipeline.inspect {0}/no --verify --gc", "cannot be combined"),
        ("-m pipeline.report", "RUN"),
        ("-m pipeline.report {0}/no --html {0}/page.html", "{0}/no"),
        ("jobs/train_haste.py --steps", "option --steps needs a value"),
        ("jobs/train_haste.py --steps many", "steps"),
        ("jobs/train_haste.py", "--store is missing"),
        ("jobs/train_haste.py --store {0}/no", "{0}/no"),
        ("jobs/train_haste.py --config {0}/list.yaml", "expected a mapping of options, found list"),
        ("jobs/train_haste.py --plan --store {0}/no", "{0}/no"),
        ("jobs/sample.py --png {0}/a.png", "--checkpoint is missing"),
        ("jobs/sample.py --png {0}/a.png --checkpoint {0}/no", "holds no checkpoint"),
        ("jobs/sample.py --num 2 --checkpoint {0}", "--num needs --npz FILE or --folder DIR"),
        ("jobs/sample.py --num 2 --png {0}/a.png", "give one of them"),
        ("jobs/evaluate.py --samples {0}/a.npz", "--reference is missing"),
        ("jobs/evaluate.py --samples {0}/a.npz --reference {0}", "{0}/a.npz': no such file"),
        ("jobs/evaluate.py --samples {0} --reference {0}/no", "{0}/no' does not exist"),
        ("jobs/export.py --checkpoint {0}/no --out {0}/a.pt", "holds no checkpoint"),
        ("jobs/demo.py --quick", "unknown option --quick"),
        (MATRIX, "there are no arms"),
        (f"{MATRIX} --config {CIFAR}", "--source is missing"),
        (f"{MATRIX} --config {CIFAR} --source digits", "--output is missing"),
        (
            f"{MATRIX} --config {CIFAR} --output {{0}} --source {{0}}/no.zip",
            "no.zip' does not exist",
        ),
        (f"{IMAGES} digits --select b", "--select b"),
        ("jobs/pretrain/self_distill.py --stepz 1", "did you mean '--steps'"),
        ("-m tests.bench stepp", "did you mean 'step'"),
        ("-m tests.bench step --rouds 1", "did you mean '--rounds'"),
        ("-m tests.faults", "--store is missing"),
    ],
)
def test_complaints_import_nothing_heavy(
    server: CommandServer, command: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / "broken.yaml").write_text("steps: [1,\n")
    (tmp_path / "list.yaml").write_text("- 1\n")
    code, output, messages = run(server, command.format(tmp_path))
    assert (code, output) == (2, "")
    assert messages.startswith("error: ")
    assert messages.count("\n") == 0
    assert message.format(tmp_path) in messages


@pytest.mark.parametrize(
    "command",
    [
        *("-m pipeline.quickstart", "-m pipeline.extract", "jobs/train_haste.py"),
        *("jobs/sample.py", "jobs/evaluate.py", "-m pipeline.inspect", "-m pipeline.report"),
    ],
)
def test_help_fits_two_screens_and_all_of_it_has_a_name(
    server: CommandServer, command: str
) -> None:
    _, page, _ = run(server, command, "--help", width="100")
    assert len(page.splitlines()) <= 80
    _, whole, _ = run(server, command, "--help-all", width="100")
    more = re.search(r"\n--help-all lists (\d+) more options\.$", page.rstrip())
    assert (more is None) == (page == whole)
    options = [set(re.findall(r"^  --([\w.-]+)", text, re.MULTILINE)) for text in (page, whole)]
    assert options[0] <= options[1]
    assert len(options[1] - options[0]) == (int(more[1]) if more else 0)


@pytest.mark.parametrize("width", [60, 100])
def test_help_is_as_wide_as_the_terminal(server: CommandServer, width: int) -> None:
    _, page, _ = run(server, "jobs/train_haste.py", "--help", width=str(width))
    lines = [line for line in page.splitlines() if len(line) > width]
    assert all(re.fullmatch(r"  --[\w.-]+ \{\S+\}", line) for line in lines)  # of one long word
    assert len(lines) < 5
    assert max(map(len, page.splitlines())) > width - 10
    _, other, _ = run(server, "jobs/train_haste.py", "--help", width="1000")
    assert page.split() == other.split()
    assert "--plan" in page


def test_help_of_the_schema_writes_nothing(tmp_path: Path) -> None:
    """In a copy, so that a wrong one spoils no file of the project."""
    (tmp_path / "schemas").mkdir()
    for path in (ROOT / "schemas").glob("*.py"):
        (tmp_path / "schemas" / path.name).write_bytes(path.read_bytes())
    for argument, code in (("--help", 0), ("--hlp", 2)):
        command = [sys.executable, "-m", "schemas.json_schema", argument]
        assert subprocess.run(command, cwd=tmp_path, capture_output=True).returncode == code
    assert not list(tmp_path.rglob("*.json"))
