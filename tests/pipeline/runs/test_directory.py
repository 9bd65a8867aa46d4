"""Uploads of a run's folder to an object store."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import fsspec
import pytest

from pipeline.runs import directory as module
from pipeline.runs.directory import RunFolder
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
