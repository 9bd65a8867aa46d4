"""Runs on a store to which a teacher stream was added."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from jobs.train_haste import train_run
from pipeline.store import Store
from pipeline.train.local import train_here
from schemas.errors import UserError
from schemas.run import RunConfig
from tests.pipeline.train.test_loop import losses, run
from tests.stores import add_random_stream, make_random_store

Make = Callable[..., RunConfig]


@pytest.fixture
def own_store(tmp_path: Path) -> Store:
    return make_random_store(tmp_path / "store")


@pytest.mark.parametrize("stopped_at", [2, 4])  # in either phase
def test_a_started_run_continues_with_its_stream(
    run_config: Make, own_store: Store, tmp_path: Path, stopped_at: int
) -> None:
    run(run_config(store=own_store.url), tmp_path / "whole")
    train_here(run_config(store=own_store.url, steps=stopped_at), tmp_path / "run")
    add_random_stream(own_store, "second")
    for stream in (None, "maps"):
        config = run_config(store=own_store.url, alignment={"stream": stream})
        train_here(config, tmp_path / "run")
        assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    config = run_config(store=own_store.url, alignment={"stream": "second"}, steps=7)
    with pytest.raises(UserError, match=r"maps for alignment.stream, the config says second"):
        train_here(config, tmp_path / "run")


def test_a_new_run_must_choose(run_config: Make, own_store: Store, tmp_path: Path) -> None:
    add_random_stream(own_store, "second")
    with pytest.raises(UserError, match="choose one of maps, second"):
        train_here(run_config(store=own_store.url), tmp_path / "run")


def test_a_stream_that_is_still_being_added_is_not_trained_on(
    run_config: Make, own_store: Store
) -> None:
    store = add_random_stream(own_store, "second")
    Path(store.root, "commits", "second", "shard-000001.json").unlink()
    for policy in ("stop", "quarantine"):
        config = run_config(
            store=store.url, alignment={"stream": "second"}, data={"on_bad_shard": policy}
        )
        with pytest.raises(UserError, match=r"stream 'second' of store .* is not complete: 1 of 4"):
            train_run(config)
