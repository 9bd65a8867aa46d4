"""Uploads of a run's folder to an object store."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import fsspec
import pytest

from jobs.train_haste import train_run
from pipeline.runs import directory as module
from pipeline.runs.directory import RunFolder, write_config
from schemas.errors import UserError
from schemas.run import RunConfig


def test_only_changed_files_are_uploaded_again(
    run_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    filesystem = fsspec.filesystem("memory")
    filesystem.pipe_file("/sent/tiny/metrics.jsonl", b"1\n")
    filesystem.pipe_file("/sent/tiny/evaluations.jsonl", b"of an earlier worker\n")
    sent: list[str] = []
    write = module.write_atomic

    def noted(filesystem: Any, path: str, data: bytes) -> None:
        sent.append(path.removeprefix("/sent/tiny/"))
        write(filesystem, path, data)

    monkeypatch.setattr(module, "write_atomic", noted)
    with RunFolder(run_config(output="memory://sent")) as run:
        (run.path / "samples").mkdir()
        (run.path / "samples" / "step-1.png").write_bytes(b"a picture")
        with (run.path / "metrics.jsonl").open("a") as metrics:
            metrics.write("2\n")
        run.publish()
        assert sorted(sent) == ["metrics.jsonl", "samples/step-1.png"]
        sent.clear()
        run.publish()
        assert sent == []
        (run.path / "samples" / "step-2.png").write_bytes(b"another")
        (run.path / "samples" / "step-1.png").write_bytes(
            b"a new one"
        )  # same length as the old one
    assert sorted(sent) == ["samples/step-1.png", "samples/step-2.png"]
    assert filesystem.cat_file("/sent/tiny/metrics.jsonl") == b"1\n2\n"
    assert filesystem.cat_file("/sent/tiny/samples/step-1.png") == b"a new one"


def test_two_commands_cannot_train_one_run(
    run_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second starts while the first trains; afterwards the lock is free."""
    config, ran = run_config(), []

    def fit(config: RunConfig) -> None:
        ran.append(config.steps)
        if len(ran) == 1:
            with pytest.raises(UserError, match=r"run '.*/tiny' is being written by process \d+"):
                train_run(config.model_copy(update={"steps": 7}))

    monkeypatch.setattr("pipeline.train.ray_trainer.fit", fit)
    cluster = "pipeline.distributed.ray_cluster.ray_cluster"
    monkeypatch.setattr(cluster, lambda _: pytest.MonkeyPatch.context())
    monkeypatch.setattr(RunFolder, "summary", lambda _: {"steps": 6})
    assert train_run(config) == {"steps": 6}
    assert train_run(config) == {"steps": 6}
    assert ran == [6, 6]


def test_a_run_on_an_object_store_ends_when_another_has_begun_it(
    run_config: Callable[..., RunConfig],
) -> None:
    config = run_config(output="memory://twice")

    def publish_in_turn(second: RunFolder) -> None:
        with RunFolder(config) as first:
            write_config(first.path, config)
            first.publish()
            first.publish()
            write_config(second.path, config)  # the same command once more
            second.publish()
            first.publish()
            write_config(second.path, config.model_copy(update={"steps": 9}))
            second.publish()
            (first.path / "metrics.jsonl").write_text("{}")
            first.publish()

    with RunFolder(config) as second:
        with pytest.raises(UserError, match=r"run 'memory://.*tiny' with other options"):
            publish_in_turn(second)
        assert not fsspec.filesystem("memory").exists("/twice/tiny/metrics.jsonl")
