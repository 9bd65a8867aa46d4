"""A verdict must be able to fail: every fault of a store or a run is found and counted."""

from __future__ import annotations

import io
import json
from collections.abc import Callable

import pytest
import torch
from safetensors.torch import save

from tests.faults.verdict import Verdict, judge_order, judge_run, judge_store

STEPS, BATCH = 4, 10
Files = dict[str, bytes]


def torch_bytes(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def run(**clock: float) -> Files:
    """Files of a run whose timing metrics are ``clock``."""
    rows: list[dict[str, object]] = [
        {"step": step, "phase": 1, "denoising": 1 / step, "steps_per_second": 3.0, **clock}
        for step in range(1, STEPS + 1)
    ]
    rows.insert(2, {"step": 2, "event": "alignment terminated"})
    state = {"step": STEPS, "phase": 2, "bytes_read": clock}
    optimizer = {"state": {0: {"exp_avg": torch.ones(3), "step": torch.tensor(4.0)}}}
    folder = f"checkpoint-{STEPS:09d}"
    return {
        "metrics.jsonl": lines(rows),
        f"{folder}/model.safetensors": save({"weight": torch.arange(4.0)}),
        f"{folder}/optimizer.pt": torch_bytes(optimizer),
        f"{folder}/state.json": json.dumps(state).encode(),
    }


def lines(rows: list[dict[str, object]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def rows_of(files: Files) -> list[dict[str, object]]:
    return [json.loads(line) for line in files["metrics.jsonl"].splitlines()]


def judged(found: Files) -> Verdict:
    return judge_run(found, run(), steps=STEPS, batch=BATCH)


def test_the_same_run_at_another_speed_is_the_same_run() -> None:
    found = run(steps_per_second=9.0, bytes_read_maps=77.0) | {"tensorboard/events": b"anything"}
    assert judged(found) == Verdict()


def test_a_missing_step_is_lost() -> None:
    found = run()
    found["metrics.jsonl"] = lines([row for row in rows_of(found) if row["step"] != 3])
    assert judged(found) == Verdict(BATCH, 0, ("the metrics have no step 3",))


def test_a_repeated_step_is_seen_twice() -> None:
    found = run()
    found["metrics.jsonl"] += lines(rows_of(run())[-1:])
    verdict = judged(found)
    assert (verdict.lost, verdict.duplicated) == (0, BATCH)
    assert verdict.problems == ("the metrics have step 4 twice",)


def test_a_step_with_other_numbers_is_lost() -> None:
    found = run()
    rows = rows_of(found)
    rows[0]["denoising"] = 1.0000001
    found["metrics.jsonl"] = lines(rows)
    assert judged(found) == Verdict(BATCH, 0, ("the metrics of step 1 differ",))


def test_a_lost_event_is_seen() -> None:
    found = run()
    found["metrics.jsonl"] = lines([row for row in rows_of(found) if "event" not in row])
    assert judged(found).problems == ("the metrics of step 2 differ",)


def flip_a_weight(found: Files) -> None:
    path = f"checkpoint-{STEPS:09d}/model.safetensors"
    found[path] = found[path][:-1] + b"\x01"


def change_the_optimizer(found: Files) -> None:
    state = {"state": {0: {"exp_avg": torch.tensor([1.0, 1.0, 2.0]), "step": torch.tensor(4.0)}}}
    found[f"checkpoint-{STEPS:09d}/optimizer.pt"] = torch_bytes(state)


def end_in_another_phase(found: Files) -> None:
    found[f"checkpoint-{STEPS:09d}/state.json"] = json.dumps({"step": STEPS, "phase": 1}).encode()


def lose_the_weights(found: Files) -> None:
    del found[f"checkpoint-{STEPS:09d}/model.safetensors"]


def leave_something(found: Files) -> None:
    found[".tmp-0123/model.safetensors"] = b""


@pytest.mark.parametrize(
    ("harm", "expected"),
    [
        (flip_a_weight, "model.safetensors differs"),
        (change_the_optimizer, "optimizer.pt differs"),
        (end_in_another_phase, "state.json differs"),
        (lose_the_weights, "model.safetensors is missing"),
        (leave_something, ".tmp-0123/model.safetensors was left behind"),
    ],
)
def test_problems_of_a_run_are_named(harm: Callable[[Files], None], expected: str) -> None:
    found = run()
    harm(found)
    (problem,) = judged(found).problems
    assert problem.endswith(expected)


def store(*shards: list[str]) -> Files:
    files = {"manifest.json": b"{}"}
    for number, keys in enumerate(shards):
        files[f"commits/shard-{number:06d}.json"] = json.dumps({"keys": keys}).encode()
        files[f"latents/shard-{number:06d}.tar"] = "".join(keys).encode()
    return files


def test_stores_are_compared_by_their_bytes() -> None:
    expected = store(["a", "b"], ["c"])
    assert judge_store(dict(expected), expected) == Verdict()
    tar = "latents/shard-000001.tar"
    assert judge_store(expected | {tar: b"d"}, expected).problems == (f"{tar} has other bytes",)
    left = "latents/.tmp-1"
    problems = judge_store(expected | {left: b""}, expected).problems
    assert problems == (f"{left} should not be there",)


def test_samples_of_a_store_are_counted() -> None:
    expected = store(["a", "b"], ["c"])
    assert judge_store(store(["a", "b"]), expected)[:2] == (1, 0)
    assert judge_store(store(["a", "b"], ["a"]), expected)[:2] == (1, 1)


def test_the_order_covers_each_epoch_once() -> None:
    assert judge_order([3, 2, 4], seed=1, window=2, steps=6, batch=3) == Verdict()


def test_an_order_that_omits_samples_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.store import SampleOrder

    locate = SampleOrder.locate
    monkeypatch.setattr(SampleOrder, "locate", lambda self, at: locate(self, at // 2 * 2))
    verdict = judge_order([3, 3], seed=1, window=2, steps=2, batch=3)
    assert (verdict.lost, verdict.duplicated) == (3, 3)
