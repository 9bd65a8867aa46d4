"""`pytest tests/parity --golden DIR`: parity with the numbers of the authors' code."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch

from tests.parity.reference import COPIED, SHARED, Golden

KINDS = {
    # fixture name: what the directory has of that kind
    "path": lambda golden: [
        name.removesuffix("_align")
        for name in golden.values("loss_values")
        if name.endswith("_align")
    ],
    "sampler_run": lambda golden: list(golden.configs["sampler"]["runs"]),
    "crop": lambda golden: golden.configs["crop"]["images"],
    "teacher_variant": lambda golden: [
        "",
        *(
            name.split(".")[0].removeprefix("variant_")
            for name in golden.tensors("dinov2_state")
            if name.startswith("variant_")
        ),
    ],
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--golden",
        metavar="DIR",
        default=None,
        help="directory of reference numbers (default: the folder `shared` beside the project, "
        "else the copy in tests/parity/golden)",
    )


def pytest_configure(config: pytest.Config) -> None:
    folder = _folder(config)
    if not (folder / "README.json").is_file():
        raise pytest.UsageError(f"--golden {folder}: no README.json of reference numbers there")


def _folder(config: pytest.Config) -> Path:
    # the default stands here too: a plain `pytest` reads this file after its command line
    given = config.getoption("--golden", default=None)
    if given is None:
        return SHARED if SHARED.is_dir() else COPIED
    return Path(config.invocation_params.dir, given)


@cache
def _open(folder: Path) -> Golden:
    return Golden(folder)


def _golden(config: pytest.Config) -> Golden:
    return _open(_folder(config))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test for each path, sampler run, crop and teacher that the directory has."""
    for name in KINDS.keys() & set(metafunc.fixturenames):
        cases = KINDS[name](_golden(metafunc.config))
        ids = [case["file"] if isinstance(case, dict) else case or "plain" for case in cases]
        metafunc.parametrize(name, cases, ids=ids)


@pytest.fixture(scope="session")
def golden(request: pytest.FixtureRequest) -> Golden:
    """The reference numbers."""
    return _golden(request.config)


@pytest.fixture(autouse=True)
def plain_float32() -> Iterator[None]:
    """One thread, no reduced precision: what the reference numbers were computed with."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
