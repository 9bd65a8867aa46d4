"""Extractions that conversions begin with."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.store import Store
from tests.conversions import Extract, encode, options


@pytest.fixture(scope="session")
def extracted(tmp_path_factory: pytest.TempPathFactory) -> Extract:
    """Extractions of the first digits by the demo's networks, each made once. Read them only."""
    root = tmp_path_factory.mktemp("extracted")
    made: dict[str, Store] = {}

    def extract(**given: Any) -> Store:
        name = "-".join(f"{key}_{value}" for key, value in given.items()) or "default"
        if name not in made:
            made[name] = encode(options(root / name.replace(" ", ""), **given))
        return made[name]

    return extract
