"""The validation loss: its numbers, its samples, and that nothing else decides them."""

from __future__ import annotations

import json
import math
import shutil
import threading
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from pipeline.distributed.process_group import ProcessGroup
from pipeline.distributed.signals import no_request
from pipeline.models import make_student
from pipeline.randomness import Purpose, generator
from pipeline.report.series import validation_panels
from pipeline.runs.metrics import VALIDATION_LOSS, read_metrics
from pipeline.runs.reader import read_run
from pipeline.store import Store, StreamReader
from pipeline.store.reading.holdout import key_rank, ranked_samples
from pipeline.train.assembly import build_run
from pipeline.train.local import train_here
from pipeline.train.loop import TrainingLoop
from schemas.errors import StoppedError, UserError
from schemas.run import RunConfig
from tests.processes import start_processes
from tests.stores import add_class_stream, make_random_store

Make = Callable[..., RunConfig]
TIMES = (0.1, 0.6)
ON: dict[str, Any] = {
    "data": {"holdout": 0.4},
    "validation": {"every": 2, "times": TIMES, "batch_size": 2},
}


def losses(run: Path) -> list[dict[str, Any]]:
    return [
        row for row in read_metrics(run / "metrics.jsonl") if row.get("event") == VALIDATION_LOSS
    ]


def test_the_loss_is_that_of_the_formula(run_config: Make, tmp_path: Path) -> None:
    """Means over samples and times of (v - (noise - x))^2, in plain torch, from the checkpoint."""
    config = run_config(**ON, checkpoint={"every": 2})
    train_here(config, tmp_path / "run")
    row = losses(tmp_path / "run")[-1]
    store = Store.open(str(config.store))
    keys = {f"sample-{n}": divmod(n, 6) for n in range(22)}
    held_out = sorted((key_rank(key), key) for key in keys if key_rank(key) < 0.4 * 2**64)
    assert 2 <= len(held_out) < 22
    for kind in ("model", "ema"):
        student = make_student(config.student)
        student.load_state_dict(
            load_file(tmp_path / "run" / "checkpoint-000000006" / f"{kind}.safetensors")
        )
        by_time = []
        for time in TIMES:
            found = []
            for rank, key in held_out:
                shard, place = keys[key]
                stored = StreamReader(store, "latents").read(np.array([shard]), np.array([place]))
                rng = generator(Purpose.VALIDATION, 0, rank)
                rng.random(2, dtype=np.float32)
                posterior, noise = (
                    torch.from_numpy(rng.standard_normal((1, 4, 8, 8), dtype=np.float32))
                    for _ in range(2)
                )
                mean, std = (torch.from_numpy(stored[part]).float() for part in ("mean", "std"))
                x = 0.5 * (mean + std * posterior)
                noisy = (1 - time) * x + time * noise
                with torch.no_grad():
                    v = student(
                        noisy, torch.tensor([time]), torch.from_numpy(stored["label"])
                    ).prediction
                found.append((v - (noise - x)).square().mean().item())
            by_time.append(np.mean(found))
            assert row[f"validation_{kind}_t{time:g}"] == pytest.approx(by_time[-1], rel=1e-5)
        assert row[f"validation_{kind}"] == pytest.approx(np.mean(by_time), rel=1e-5)


def test_the_bytes_that_it_reads_are_counted(run_config: Make, tmp_path: Path) -> None:
    """Bytes of the run's own store are counted once, those of another store are not."""
    other = make_random_store(tmp_path / "other", samples=9)
    manifest = Path(other.root, "manifest.json")
    manifest.write_text(manifest.read_text().replace("0" * 64, "9" * 64))
    changes: dict[str, dict[str, Any]] = {
        "none": {},
        "other": {"validation": {**ON["validation"], "store": other.url}},
        "off": {"data": ON["data"]},
        "on": ON,
    }
    read = {}
    for name, options in changes.items():
        train_here(run_config(**options, steps=4), tmp_path / name)
        summary = json.loads((tmp_path / name / "summary.json").read_text())["bytes_read"]
        read[name] = {stream: sum(counts.values()) for stream, counts in summary.items()}
    store = Store.open(str(run_config().store))
    held_out = ranked_samples(store, ON["data"]["holdout"])
    expected = 0
    for shard, row in zip(held_out.shards.tolist(), held_out.rows.tolist(), strict=True):
        (file,) = store.record(shard).streams["latents"]
        expected += sum(sizes[row] for sizes in file.sizes.values())
    assert read["on"]["latents"] - read["off"]["latents"] == expected
    assert read["on"]["maps"] == read["off"]["maps"]
    assert read["other"] == read["none"]


@pytest.mark.parametrize(
    ("changes", "class_token"),
    [
        ({"student": {"class_token": 12}}, True),
        ({"student": {"model": "DiT-S/2"}}, False),
        ({"alignment": {"feature_weight": 0, "attention_weight": 0, "termination": None}}, False),
    ],
)
def test_every_kind_of_student(
    run_config: Make, tmp_path: Path, changes: dict[str, Any], class_token: bool
) -> None:
    store = add_class_stream(make_random_store(tmp_path / "store"))
    config = run_config(**{**ON, **changes, "store": store.url, "steps": 4})
    train_here(config, tmp_path / "run")
    rows = losses(tmp_path / "run")
    assert [row["step"] for row in rows] == [2, 4]
    for row in rows:
        assert ("validation_ema_class_token_t0.6" in row) == class_token
        assert all(math.isfinite(v) for k, v in row.items() if k.startswith("validation"))
    assert rows[0]["validation_model"] != rows[1]["validation_model"]


def test_training_is_not_changed_by_it_but_for_the_held_out_samples(
    run_config: Make, tmp_path: Path
) -> None:
    held = {"data": {"holdout": 0.4}}
    for name, options in {"off": held, "on": ON}.items():
        train_here(run_config(**options), tmp_path / name)
    checkpoints = [tmp_path / name / "checkpoint-000000006" for name in ("off", "on")]
    one, other = (load_file(path / "model.safetensors") for path in checkpoints)
    assert all(torch.equal(one[key], other[key]) for key in one)
    rows = [
        [r.get("denoising") for r in read_metrics(tmp_path / n / "metrics.jsonl") if "phase" in r]
        for n in ("off", "on")
    ]
    assert rows[0] == rows[1]


def test_held_out_samples_are_never_trained_on(run_config: Make, tmp_path: Path) -> None:
    config = run_config(**ON)
    parts = build_run(config, tmp_path / "run", ProcessGroup(), nullcontext(None), no_request)
    order, store = parts.probe.order, parts.store
    shards, rows = order.locate(np.arange(3 * order.epoch_size))
    seen = {store.record(s).keys[r] for s, r in zip(shards.tolist(), rows.tolist(), strict=True)}
    parts.close()
    held_out = {f"sample-{n}" for n in range(22) if key_rank(f"sample-{n}") < 0.4 * 2**64}
    assert seen == {f"sample-{n}" for n in range(22)} - held_out
    assert len(shards) == 3 * len(seen)


def test_ranks_do_not_depend_on_shards(tmp_path: Path) -> None:
    small, large = (make_random_store(tmp_path / f"{n}", shard_size=n) for n in (3, 8))
    found = []
    for store in (small, large):
        part = ranked_samples(store, 0.5)
        places = zip(part.shards.tolist(), part.rows.tolist(), strict=True)
        found.append([store.record(shard).keys[row] for shard, row in places])
        assert set(ranked_samples(store, 0.2).ranks) < set(part.ranks)
    assert found[0] == found[1] != []


class Part:
    """One of two workers; ``other`` are the rows of the other one."""

    world_size = 2

    def __init__(self, rank: int, other: np.ndarray | None = None, failed: int = 0) -> None:
        self.rank, self.other, self.failed = rank, other, failed

    def concatenate(self, rows: np.ndarray) -> np.ndarray:
        self.own = rows
        return rows if self.other is None else np.concatenate([rows, self.other])

    def sum_counts(self, counts: dict[str, int]) -> dict[str, int]:
        return {"failed": counts["failed"] + self.failed}


def test_each_worker_reads_its_part_of_the_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make_random_store(tmp_path / "store", shard_size=3)
    read: list[int] = []
    record = Store.record

    def count(self: Store, shard: int, *args: Any) -> Any:
        read.append(shard)
        return record(self, shard, *args)

    monkeypatch.setattr(Store, "record", count)
    alone = ranked_samples(store, 0.6)
    assert sorted(read) == list(range(8))
    parts = [Part(rank) for rank in (0, 1)]
    for part in parts:
        read.clear()
        ranked_samples(store, 0.6, part)
        assert sorted(read) == list(range(part.rank, 8, 2))
    together = ranked_samples(store, 0.6, Part(0, other=parts[1].own))
    assert all(np.array_equal(one, other) for one, other in zip(alone, together, strict=True))
    assert together.ranks.dtype == np.uint64
    read.clear()
    ranked_samples(store, 0.6, Part(1, failed=1))  # the other worker could not read a record
    assert set(read) == set(range(8))
    Path(store.root, "commits", "shard-000003.json").write_text("{")
    for part in (Part(1), Part(0, failed=1)):  # both say which
        with pytest.raises(UserError, match="shard-000003"):
            ranked_samples(Store.open(store.url), 0.6, part)


def _worker(rank: int, world: int, values: dict[str, Any], folder: str) -> None:
    if world > 1:
        torch.distributed.init_process_group(
            "gloo", f"file://{folder}/store-{world}", rank=rank, world_size=world
        )
    group = ProcessGroup(rank, world)
    config = RunConfig.model_validate(values)
    parts = build_run(config, Path(folder, f"run-{world}"), group, nullcontext(None), no_request)
    assert parts.validation_loss is not None
    event = parts.validation_loss.measure(lambda: None)
    parts.close()
    Path(folder, f"event-{world}-{rank}.json").write_text(json.dumps(event))


def test_any_number_of_workers_measures_the_same_bits(run_config: Make, tmp_path: Path) -> None:
    """With weights divided among them too."""
    values = run_config(**ON).model_dump(mode="json")
    start_processes(_worker, 1, 1, values, str(tmp_path))
    start_processes(_worker, 3, 3, values, str(tmp_path))
    divided = {**values, "global_batch": 6, "compute": {"shard": "fsdp2"}}
    start_processes(_worker, 2, 2, divided, str(tmp_path))
    texts = {path.read_text() for path in tmp_path.glob("event-*.json")}
    assert len(list(tmp_path.glob("event-*.json"))) == 6
    assert len(texts) == 1


def test_another_store(run_config: Make, tmp_path: Path) -> None:
    other = make_random_store(tmp_path / "other", samples=9)
    options = {"validation": {**ON["validation"], "store": other.url}}
    before = set(threading.enumerate())
    with pytest.raises(UserError, match=r"validation.store .* holds the images that the run is tr"):
        train_here(run_config(**options), tmp_path / "same")
    assert set(threading.enumerate()) <= before  # nothing is read ahead, and no log is open
    assert not (tmp_path / "same" / "metrics.jsonl").exists()
    manifest = Path(other.root, "manifest.json")
    manifest.write_text(manifest.read_text().replace("0" * 64, "9" * 64))
    train_here(run_config(**options), tmp_path / "run")
    assert [row["step"] for row in losses(tmp_path / "run")] == [2, 4, 6]
    manifest.write_text(
        manifest.read_text().replace('"scaling_factor": 0.5', '"scaling_factor": 0.7')
    )
    with pytest.raises(
        UserError, match=r"its autoencoder.scaling_factor is 0.7, that of the run's"
    ):
        train_here(run_config(**options), tmp_path / "scaled")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"validation": {"every": 2}}, "set data.holdout, for example 0.01, or validation.store"),
        ({"validation": {"every": 2, "store": "x"}, "data": {"holdout": 0.1}}, "set one"),
        ({"validation": {"store": "x"}}, "read with validation.every only"),
        ({"validation": {"every": 2, "times": []}, "data": {"holdout": 0.1}}, "at least 1 item"),
        ({"validation": {"every": 2, "times": [1.0]}}, "less than 1"),
        ({"validation": {"every": 2, "times": [0.5, 0.5]}}, "names a time twice"),
        (
            {
                "alignment": {
                    "termination": {"kind": "residual_plateau", "residual": "validation_loss"}
                }
            },
            "needs validation.every",
        ),
    ],
)
def test_options_that_do_not_fit(run_config: Make, changes: dict[str, Any], message: str) -> None:
    values = run_config().model_dump(mode="json")
    with pytest.raises(ValueError, match=message):
        RunConfig.model_validate(values | changes)


@pytest.mark.parametrize(
    ("holdout", "message"), [(1e-9, "holds no samples"), (0.999999, "leaves none")]
)
def test_parts_without_samples(
    run_config: Make, tmp_path: Path, holdout: float, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        train_here(run_config(**{**ON, "data": {"holdout": holdout}}), tmp_path / "run")


def test_defaults_are_not_saved(run_config: Make) -> None:
    saved = run_config().model_dump(mode="json")
    assert "validation" not in saved
    assert "holdout" not in saved["data"]
    on = run_config(**ON).model_dump(mode="json")
    assert RunConfig.model_validate(on) == run_config(**ON)


def test_a_resumed_run_repeats_nothing_and_misses_nothing(run_config: Make, tmp_path: Path) -> None:
    """Stopped in the middle of a measurement: it is made again, once."""
    config = run_config(
        **ON,
        steps=8,
        alignment={
            "termination": {
                "kind": "residual_plateau",
                "residual": "validation_loss",
                "dry": True,
                "start": 0,
                "every": 1,
                "fast": 0.5,
                "slow": 0.9,
            }
        },
    )
    train_here(config, tmp_path / "whole")
    calls = 0
    original = TrainingLoop._save_or_stop_if_requested

    def stop(self: TrainingLoop) -> None:
        nonlocal calls
        calls += self._paused and self.trainer.step == 4
        if calls == 2:
            calls = -100
            self._save()
            raise StoppedError("stopped")
        original(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingLoop, "_save_or_stop_if_requested", stop)
        with pytest.raises(StoppedError):
            train_here(config, tmp_path / "cut")
    assert [row["step"] for row in losses(tmp_path / "cut")] == [2]
    train_here(config, tmp_path / "cut")
    events = [
        [row for row in read_metrics(tmp_path / name / "metrics.jsonl") if "event" in row]
        for name in ("whole", "cut")
    ]
    assert events[0] == events[1]
    observed = [row for row in events[0] if row["event"] != VALIDATION_LOSS]
    assert [row["step"] for row in observed] == [6, 7]  # from the third measurement on
    other = config.model_copy(update={"data": config.data.model_copy(update={"holdout": 0.3})})
    with pytest.raises(UserError, match=r"it has 0.4 for data.holdout, the config says 0.3"):
        train_here(other, tmp_path / "cut")


def test_unreadable_samples_under_quarantine(run_config: Make, tmp_path: Path) -> None:
    store = make_random_store(tmp_path / "store")
    shard = int(ranked_samples(store, 0.4).shards[0])
    path = Path(store.root, "latents", f"shard-{shard:06d}.tar")
    path.unlink()
    config = run_config(**ON, store=store.url)
    with pytest.raises(UserError, match="is missing"):
        train_here(config, tmp_path / "stop")
    rest = {"data": {**ON["data"], "on_bad_shard": "quarantine"}}
    train_here(run_config(**{**ON, **rest}, store=store.url), tmp_path / "run")
    assert losses(tmp_path / "run")[0]["validation_ema"] > 0.1
    rest["validation"] = {**ON["validation"], "samples": 1}  # that of the lost file
    train_here(run_config(**{**ON, **rest}, store=store.url), tmp_path / "none")
    assert losses(tmp_path / "none")[0]["validation_ema"] is None


def test_the_report_shows_it(run_config: Make, tmp_path: Path) -> None:
    train_here(run_config(**ON), tmp_path / "run")
    record = read_run(str(tmp_path / "run"))
    assert all(row["event"] != VALIDATION_LOSS for row in record.events)
    (panel,) = validation_panels([record])
    assert [line.name for line in panel.lines] == [None, "weights as trained"]
    rows = losses(tmp_path / "run")
    assert list(panel.lines[0].values) == [row["validation_ema"] for row in rows]
    shutil.rmtree(tmp_path / "run")
