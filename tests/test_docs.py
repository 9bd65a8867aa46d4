"""Documents name files, modules and tests that exist."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted(
    {
        ROOT / "README.md",
        ROOT / "tests" / "bench" / "RESULTS.md",
        *ROOT.glob("pipeline/**/README.md"),
        *ROOT.glob("jobs/**/*.md"),
        *ROOT.glob("docker/**/*.md"),
    }
)
LINK = re.compile(r"\]\(([^)\s#]+)")
PATH = re.compile(r"(?<![\w/.:-])(?:pipeline|schemas|jobs|tests|docker)/[\w./*$-]*")
MODULE = re.compile(r"python -m ((?:pipeline|schemas|jobs|tests)[\w.]*)")
TESTS = re.compile(r"\]\(([^)\s]+/test_\w+\.py)\)((?:[:,]\s*`test_\w+`)+)")


def missing(text: str, folder: Path, root: Path = ROOT) -> Iterator[str]:
    """Names in ``text``, a document in ``folder``, that do not exist in the project."""
    for link in LINK.findall(text):
        if "://" not in link and not (folder / link).exists():
            yield f"link {link}"
    for path in PATH.findall(text):
        path = re.sub(r"\$\w+", "*", path.rstrip("."))  # a shell variable
        if not any(root.glob(path.rstrip("/"))):
            yield f"path {path}"
    for module in MODULE.findall(text):
        base = root / module.rstrip(".").replace(".", "/")
        if not (base.with_suffix(".py").is_file() or (base / "__main__.py").is_file()):
            yield f"module {module}"
    for link, names in TESTS.findall(text):
        file = folder / link
        source = file.read_text(encoding="utf-8") if file.is_file() else ""
        for name in re.findall(r"test_\w+", names):
            if not re.search(rf"^\s*def {name}\(", source, re.MULTILINE):
                yield f"test {link}: {name}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_named_things_exist(document: Path) -> None:
    assert list(missing(document.read_text(encoding="utf-8"), document.parent)) == []


def test_table_of_differences_names_tests() -> None:
    """The table is parsed as a table: a change of its form must not empty the check."""
    method = ROOT / "pipeline" / "alignment" / "README.md"
    assert len(TESTS.findall(method.read_text(encoding="utf-8"))) >= 5


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 120


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("see [a](pipeline/gone.py)", {"link pipeline/gone.py", "path pipeline/gone.py"}),
        ("see [a](https://example.org/x)", set()),
        ("in `tests/a/test_a.py`. In tests/a/.", set()),
        ("--config jobs/gone/*.yaml.", {"path jobs/gone/*.yaml"}),
        ("for a in 1; do cat tests/$a.py; done", {"path tests/*.py"}),
        ("cat tests/$a/test_a.py", set()),
        ("python -m pipeline.store convert A", {"module pipeline.store"}),
        ("`python -m tests.a`, and", set()),
        ("[t](tests/a/test_a.py): `test_one`", set()),
        ("[t](tests/a/test_a.py): `test_one`, `test_2`", {"test tests/a/test_a.py: test_2"}),
    ],
)
def test_missing_things_are_found(tmp_path: Path, text: str, expected: set[str]) -> None:
    folder = tmp_path / "tests" / "a"
    folder.mkdir(parents=True)
    (folder / "__main__.py").touch()
    (folder / "test_a.py").write_text("def test_one() -> None:\n    pass\n")
    assert set(missing(text, tmp_path, tmp_path)) == expected
