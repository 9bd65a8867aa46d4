"""Real stores of each cut, made on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from pipeline.store import Store
from tests.encoded import encode


@pytest.fixture(scope="package")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Store]:
    made: dict[str, Store] = {}

    def store(cut: str, **options: Any) -> Store:
        name = f"{cut}-{options}"
        if name not in made:
            made[name] = encode(tmp_path_factory.mktemp(cut) / "store", cut=cut, **options)
        return made[name]

    return store
