"""What a disturbed run left, against what an undisturbed one gives."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from pipeline.runs.directory import METRICS
from pipeline.storage.files import TEMPORARY
from pipeline.store import SampleOrder
from tests.faults.work import parse_rows

Files = Mapping[str, bytes]
Rows = Sequence[Mapping[str, Any]]

OF_THE_CLOCK = (
    "steps_per_second",
    "images_per_second",
    "tflops_per_worker",
    "mfu",
    "data_wait_share",
    "bytes_",
)
"""Metrics, by their beginnings, that say how fast something went, and what was read again."""
OF_THE_STATE = ("step", "samples_consumed", "phase", "termination", "trigger")


class Verdict(NamedTuple):
    """Counts are of samples; an empty tuple of problems is what is wanted."""

    lost: int = 0
    duplicated: int = 0
    problems: tuple[str, ...] = ()


def judge_store(found: Files, expected: Files) -> Verdict:
    """Files below the roots of two stores."""
    problems = [f"{path} is missing" for path in sorted(expected.keys() - found.keys())]
    problems += [f"{path} should not be there" for path in sorted(found.keys() - expected.keys())]
    altered = [path for path in sorted(expected.keys() & found) if found[path] != expected[path]]
    problems += [f"{path} has other bytes" for path in altered]
    there, wanted = _keys(found), _keys(expected)
    lost = sum((wanted - there).values())
    return Verdict(lost, sum((there - wanted).values()), tuple(problems))


def judge_run(found: Files, expected: Files, *, steps: int, batch: int) -> Verdict:
    """Files below the folders of two runs that took ``steps`` steps."""
    problems = [f"{path} was left behind" for path in sorted(found) if _is_temporary(path)]
    rows, wanted = (parse_rows(files.get(METRICS, b"")) for files in (found, expected))
    taken = Counter(row["step"] for row in rows if "event" not in row)
    missing = [step for step in range(1, steps + 1) if not taken[step]]
    repeated = {step: times - 1 for step, times in taken.items() if times > 1}
    problems += [f"the metrics have no step {step}" for step in missing]
    problems += [f"the metrics have step {step} twice" for step in repeated]
    other = _steps_that_differ(rows, wanted) - set(missing)
    problems += [f"the metrics of step {step} are other ones" for step in sorted(other)]
    problems += _compare_weights(found, expected, f"checkpoint-{steps:09d}/")
    lost = batch * (len(missing) + len(other))
    return Verdict(lost, batch * sum(repeated.values()), tuple(problems))


def judge_order(
    samples_per_shard: Sequence[int], *, seed: int, window: int, steps: int, batch: int
) -> Verdict:
    """Whether the undisturbed run, whose every step a disturbed one must equal, sees each sample
    exactly once per epoch. It has whole epochs."""
    order = SampleOrder(seed, list(samples_per_shard), window=window)
    size = sum(samples_per_shard)
    shards, rows = order.locate(np.arange(steps * batch))
    seen = Counter(
        (at // size, int(shard), int(row))
        for at, (shard, row) in enumerate(zip(shards, rows, strict=True))
    )
    epochs = steps * batch // size
    lost = epochs * size - len(seen)
    twice = sum(times - 1 for times in seen.values())
    problems = (f"the order of samples omits {lost} and repeats {twice}",) if lost or twice else ()
    return Verdict(lost, twice, problems)


def _keys(files: Files) -> Counter[str]:
    """Of the samples in the commit records."""
    keys: Counter[str] = Counter()
    for path, data in files.items():
        if path.startswith("commits/shard-"):
            try:
                keys.update(json.loads(data)["keys"])
            except (ValueError, KeyError, TypeError):
                continue  # the comparison of bytes names it
    return keys


def _steps_that_differ(rows: Rows, expected: Rows) -> set[int]:
    there, wanted = (Counter(map(_numbers, some)) for some in (rows, expected))
    return {dict(row)["step"] for row in set(there) ^ set(wanted)}


def _numbers(row: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    return tuple(
        (name, value if isinstance(value, int | float | str) else json.dumps(value))
        for name, value in sorted(row.items())
        if not name.startswith(OF_THE_CLOCK)
    )


def _is_temporary(path: str) -> bool:
    return any(part.startswith(TEMPORARY) for part in path.split("/")) or path.endswith(".tmp")


def _compare_weights(found: Files, expected: Files, folder: str) -> list[str]:
    problems = []
    for path in sorted(path for path in expected if path.startswith(folder)):
        if path not in found:
            problems.append(f"{path} is missing")
        elif not _same(path, found[path], expected[path]):
            problems.append(f"{path} differs")
    return problems


def _same(path: str, found: bytes, expected: bytes) -> bool:
    if path.endswith(".json"):
        one, other = (json.loads(data) for data in (found, expected))
        return all(one.get(key) == other.get(key) for key in OF_THE_STATE)
    if path.endswith((".pt", ".pth")):
        one, other = (torch.load(io.BytesIO(d), weights_only=True) for d in (found, expected))
        return _equal(one, other)
    return found == expected or path.startswith(".")


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_equal(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(_equal, one, other))
    return bool(one == other)
