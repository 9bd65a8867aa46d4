"""A good manifest with one value replaced: what reads it works, or says in a line what is wrong."""

from __future__ import annotations

import json
import math
import random
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from pipeline.cli.config_files import merge
from pipeline.inspect.check import check_configs
from pipeline.inspect.summary import describe, summarise
from pipeline.runs.compatibility import check_store
from pipeline.store import Store
from pipeline.targets.sources import Wanted, read_targets
from schemas.errors import UserError
from schemas.run import RunConfig
from tests.encoded import encode
from tests.stores import tiny_run

TRIED = 9
"""So many of ``VALUES`` are put in each place of a manifest."""
SURVIVORS = 6
"""So many of the manifests that open are trained from, for each cut: a teacher takes its time."""
MAX_MEGABYTES = 300
"""More than whatever is allocated for any of them."""

Keys = tuple[str | int, ...]

VALUES: tuple[Any, ...] = (
    *(-1, 0, 1, 10**9, 2**63, 10**400, True, None, [], {}, [[]]),
    *("", "../x", "x" * 100_000, "\x1b[31m", "hf-hub:a/b", "commits"),
    *(math.nan, math.inf, 0.5, 1e308),
)
RUN = merge(
    tiny_run(),
    {
        "student": {"model": "SiT-S/1", "heads": 6, "num_classes": 10},
        "alignment": {"teacher_layers": [3, 4]},
    },
)


def values_in(document: Any, keys: Keys = ()) -> Iterator[Keys]:
    """Paths of the values of a JSON document, including lists and tables that are not empty."""
    if keys:
        yield keys
    if isinstance(document, dict | list):
        for key in document if isinstance(document, dict) else range(len(document)):
            yield from values_in(document[key], (*keys, key))


def replaced(text: str, keys: Keys, value: Any) -> str:
    document = inside = json.loads(text)
    for key in keys[:-1]:
        inside = inside[key]
    inside[keys[-1]] = value
    return json.dumps(document)


def works_or_says_why(keys: Keys, value: Any, call: Callable[[], object]) -> bool:
    reason = None
    try:
        call()
    except UserError as error:
        reason = str(error)
    except Exception as error:
        pytest.fail(f"{'.'.join(map(str, keys))} = {value!r:.60}: {error!r:.300}")
    assert "\n" not in (reason or ""), (keys, value)
    return reason is None


@pytest.mark.parametrize("cut", ["maps", "activations", "image"])
def test_a_manifest_with_one_hostile_value(tmp_path: Path, cut: str) -> None:
    store = encode(tmp_path / "store", samples=2, cut=cut)
    manifest, config = tmp_path / "store" / "manifest.json", tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(RUN))
    run, text = RunConfig.model_validate(RUN), manifest.read_text()

    def look() -> None:
        opened = Store.open(store.url)
        describe(opened, summarise(opened))
        check_store(run, opened.manifest)

    def train() -> None:
        opened = Store.open(store.url)
        (answer,) = check_configs(opened, (str(config),))
        wanted = Wanted(features=True, layers=(3, 4), heads=6)
        targets = read_targets(opened, np.array([0]), np.array([1]), wanted)
        assert targets.attention is not None
        assert answer.ok, answer.reason

    look()
    train()
    before = peak_megabytes()
    rng = random.Random(cut)
    survivors = []
    for keys in values_in(json.loads(text)):
        for value in rng.sample(VALUES, TRIED):
            manifest.write_text(replaced(text, keys, value))
            if works_or_says_why(keys, value, look):
                survivors.append((keys, value))
    for keys, value in rng.sample(survivors, SURVIVORS):
        manifest.write_text(replaced(text, keys, value))
        works_or_says_why(keys, value, train)
    assert peak_megabytes() - before < MAX_MEGABYTES


def peak_megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
