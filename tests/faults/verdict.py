"""Comparison of a disturbed store or run with an undisturbed one."""

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
from tests.faults.workloads import parse_rows

Files = Mapping[str, bytes]
Rows = Sequence[Mapping[str, Any]]

TIMING_METRICS = (
    "steps_per_second",
    "images_per_second",
    "tflops_per_worker",
    "mfu",
    "data_wait_share",
    "bytes_",
)
"""Prefixes of metrics that depend on speed or count repeated reads; they are not compared."""
STATE_KEYS = ("step", "samples_consumed", "phase", "termination", "trigger")


class Verdict(NamedTuple):
    """Numbers of samples, and problems; an undisturbed result has none."""

    lost: int = 0
    duplicated: int = 0
    problems: tuple[str, ...] = ()


def judge_store(found: Files, expected: Files) -> Verdict:
    """Compare the files of two stores, by path below their roots."""
    problems = [f"{path} is missing" for path in sorted(expected.keys() - found.keys())]
    problems += [f"{path} should not be there" for path in sorted(found.keys() - expected.keys())]
    altered = [path for path in sorted(expected.keys() & found) if found[path] != expected[path]]
    problems += [f"{path} has other bytes" for path in altered]
    found_keys, expected_keys = _keys(found), _keys(expected)
    lost = sum((expected_keys - found_keys).values())
    duplicated = sum((found_keys - expected_keys).values())
    return Verdict(lost, duplicated, tuple(problems))


def judge_run(found: Files, expected: Files, *, steps: int, batch: int) -> Verdict:
    """Compare the files of two runs of ``steps`` steps, by path below their folders."""
    problems = [f"{path} was left behind" for path in sorted(found) if _is_temporary(path)]
    rows, expected_rows = (parse_rows(files.get(METRICS, b"")) for files in (found, expected))
    taken = Counter(row["step"] for row in rows if "event" not in row)
    missing = [step for step in range(1, steps + 1) if not taken[step]]
    repeated = {step: times - 1 for step, times in taken.items() if times > 1}
    problems += [f"the metrics have no step {step}" for step in missing]
    problems += [f"the metrics have step {step} twice" for step in repeated]
    other = _different_steps(rows, expected_rows) - set(missing)
    problems += [f"the metrics of step {step} differ" for step in sorted(other)]
    problems += _compare_weights(found, expected, f"checkpoint-{steps:09d}/")
    lost = batch * (len(missing) + len(other))
    return Verdict(lost, batch * sum(repeated.values()), tuple(problems))


def judge_order(
    samples_per_shard: Sequence[int], *, seed: int, window: int, steps: int, batch: int
) -> Verdict:
    """Check that the undisturbed run, which every disturbed run must equal step by step, sees each
    sample exactly once per epoch. ``steps`` must be complete epochs."""
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
    """Keys of the samples in the commit records."""
    keys: Counter[str] = Counter()
    for path, data in files.items():
        if path.startswith("commits/shard-"):
            try:
                keys.update(json.loads(data)["keys"])
            except (ValueError, KeyError, TypeError):
                continue  # reported by the comparison of bytes
    return keys


def _different_steps(rows: Rows, expected: Rows) -> set[int]:
    found, wanted = (Counter(map(_numbers, some)) for some in (rows, expected))
    return {dict(row)["step"] for row in set(found) ^ set(wanted)}


def _numbers(row: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    return tuple(
        (name, value if isinstance(value, int | float | str) else json.dumps(value))
        for name, value in sorted(row.items())
        if not name.startswith(TIMING_METRICS)
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
        return all(one.get(key) == other.get(key) for key in STATE_KEYS)
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
