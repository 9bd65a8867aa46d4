"""`pytest tests/parity --golden DIR --recipes DIR`: parity with the numbers of the authors' code.

``--golden`` holds HASTE's SiT, teacher and samplers; ``--recipes`` REG, iREPA, REPA's variants and
HASTE's text-to-image training.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch

from tests.parity.reference import COPIED, COPIED_RECIPES, SHARED, SHARED_RECIPES, Golden

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


RECIPE_KINDS = {
    "irepa_run": lambda recipes: list(recipes.configs["irepa"]["runs"]),
    "repa2_run": lambda recipes: list(recipes.values("repa2_loss_values")),
    "reg_sampler_run": lambda recipes: list(recipes.configs["reg_sampler"]["runs"]),
    "t2i_sampler_run": lambda recipes: list(recipes.configs["t2i_sampler"]["runs"]),
    "reg_path": lambda recipes: list(recipes.values("reg_loss_values")),
    "t2i_variant": lambda recipes: sorted(recipes.values("t2i_train_values").keys() - {"config"}),
}
SETS = {"golden": (SHARED, COPIED), "recipes": (SHARED_RECIPES, COPIED_RECIPES)}
"""Option: its default beside the project, and the copy in it."""


def pytest_addoption(parser: pytest.Parser) -> None:
    for name in SETS:
        parser.addoption(
            f"--{name}",
            metavar="DIR",
            default=None,
            help="directory of reference numbers (default: the folder `shared` beside the project, "
            "else the copy in tests/parity)",
        )


def pytest_configure(config: pytest.Config) -> None:
    for name in SETS:
        folder = _folder(config, name)
        if not (folder / "README.json").is_file():
            raise pytest.UsageError(f"--{name} {folder}: no README.json of reference numbers there")


def _folder(config: pytest.Config, name: str) -> Path:
    # the default stands here too: a plain `pytest` reads this file after its command line
    given = config.getoption(f"--{name}", default=None)
    if given is None:
        shared, copied = SETS[name]
        return shared if shared.is_dir() else copied
    return Path(config.invocation_params.dir, given)


@cache
def _open(folder: Path) -> Golden:
    return Golden(folder)


def _golden(config: pytest.Config, name: str = "golden") -> Golden:
    return _open(_folder(config, name))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test for each path, sampler run, crop and teacher that the directory has."""
    for source, kinds in {"golden": KINDS, "recipes": RECIPE_KINDS}.items():
        for name in kinds.keys() & set(metafunc.fixturenames):
            cases = kinds[name](_golden(metafunc.config, source))
            ids = [case["file"] if isinstance(case, dict) else case or "plain" for case in cases]
            metafunc.parametrize(name, cases, ids=ids, scope="module")


@pytest.fixture(scope="session")
def golden(request: pytest.FixtureRequest) -> Golden:
    """The reference numbers."""
    return _golden(request.config)


@pytest.fixture(scope="session")
def recipes(request: pytest.FixtureRequest) -> Golden:
    """The reference numbers of REG, iREPA and REPA's variants."""
    return _golden(request.config, "recipes")


@pytest.fixture(autouse=True)
def plain_float32() -> Iterator[None]:
    """One thread, no reduced precision: what the reference numbers were computed with."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
