"""Joining and starting clusters, without Ray: its token, and its errors."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.exceptions import AuthenticationError

from pipeline.cli.log_setup import LEVEL_VARIABLE
from pipeline.distributed.ray_cluster import ray_cluster
from schemas.errors import UserError

NAMES = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
Seen = list[dict[str, str]]


def authentication() -> dict[str, str]:
    return {name: os.environ[name] for name in NAMES if name in os.environ}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in (*NAMES, "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.fixture
def seen(home: Path, monkeypatch: pytest.MonkeyPatch) -> Seen:
    """The variables that each cluster was started with; Ray sets its mode, as 2.60 does."""
    found: Seen = []

    def init(**_: Any) -> None:
        found.append(authentication())
        os.environ.setdefault("RAY_AUTH_MODE", "token")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setattr("pipeline.distributed.ray_cluster.relayed_logs", pytest.MonkeyPatch.context)
    return found


def test_a_local_cluster_has_a_secret_token_that_ends_with_it(home: Path, seen: Seen) -> None:
    for address in (None, "local"):  # Ray caches the first token of a process
        with ray_cluster(address):
            pass
        assert authentication() == {}
    first, second = seen
    assert first == second
    assert set(first) == {"RAY_AUTH_TOKEN"}
    assert len(first["RAY_AUTH_TOKEN"]) == 64
    assert list(home.iterdir()) == []


@pytest.mark.parametrize("level", [None, "info", "debug"])
def test_rays_own_lines_are_for_debugging(
    level: str | None, seen: Seen, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither Ray's messages nor the workers' output with Ray's prefixes; ours are relayed."""
    options: dict[str, Any] = {}
    monkeypatch.setattr(ray, "init", lambda **given: options.update(given))
    monkeypatch.delenv(LEVEL_VARIABLE, raising=False)
    if level is not None:
        monkeypatch.setenv(LEVEL_VARIABLE, level)
    with ray_cluster(None):
        pass
    assert options["log_to_driver"] == (level == "debug")
    assert options["logging_level"] == (logging.INFO if level == "debug" else logging.WARNING)
    for name in ("ray.train", "ray.data"):
        assert logging.getLogger(name).level == options["logging_level"]


def test_the_environment_is_restored_after_an_error(seen: Seen) -> None:
    with pytest.raises(ZeroDivisionError), ray_cluster(None):
        raise ZeroDivisionError
    assert authentication() == {}


@pytest.mark.parametrize(
    "own",
    [
        {"RAY_AUTH_MODE": "disabled"},
        {"RAY_AUTH_TOKEN": "mine"},
        {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "mine"},
        {"RAY_AUTH_TOKEN_PATH": "/run/secrets/ray"},
    ],
)
def test_the_users_own_settings_are_used(
    own: dict[str, str], seen: Seen, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in own.items():
        monkeypatch.setenv(name, value)
    with ray_cluster(None):
        pass
    assert seen == [own]
    assert authentication() == own


def test_the_token_of_the_home_is_used(home: Path, seen: Seen) -> None:
    (home / ".ray").mkdir()
    file = home / ".ray" / "auth_token"
    file.write_text("")  # Ray takes it for none and would write one
    with ray_cluster(None):
        pass
    file.write_text("mine")
    with ray_cluster(None):
        pass
    assert [sorted(values) for values in seen] == [["RAY_AUTH_TOKEN"], []]
    assert file.read_text() == "mine"


def test_token_mode_without_a_token_needs_no_file(
    seen: Seen, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("HOME", os.devnull)
    with ray_cluster(None):
        pass
    assert sorted(seen[0]) == ["RAY_AUTH_MODE", "RAY_AUTH_TOKEN"]


def test_a_cluster_elsewhere_gets_no_token_of_ours(seen: Seen) -> None:
    with ray_cluster("10.0.0.1:6379"):
        pass
    assert seen == [{}]


@pytest.mark.parametrize(
    ("error", "address", "expected"),
    [
        (
            AuthenticationError("no authentication token was found"),
            "10.0.0.1:6379",
            "no Ray cluster '10.0.0.1:6379': no authentication token was found: give the cluster's "
            "token in RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH, and RAY_AUTH_MODE=token",
        ),
        (
            RuntimeError("Failed to connect to GCS: InvalidAuthToken"),
            "10.0.0.1:6379",
            "no Ray cluster '10.0.0.1:6379': Failed to connect to GCS: InvalidAuthToken: give the "
            "cluster's token in RAY_AUTH_TOKEN or",
        ),
        (
            PermissionError(13, "Permission denied", "/home/me/.ray"),
            None,
            "no Ray cluster on this machine: [Errno 13] Permission denied: '/home/me/.ray'",
        ),
        (
            Exception("The current node timed out\nduring startup."),
            None,
            "no Ray cluster on this machine: The current node timed out during startup.",
        ),
    ],
)
def test_rays_errors_are_one_line(
    error: Exception,
    address: str | None,
    expected: str,
    seen: Seen,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(**_: Any) -> None:
        raise error

    monkeypatch.setattr(ray, "init", refuse)
    with pytest.raises(UserError) as raised, ray_cluster(address):
        pass
    assert str(raised.value).startswith(expected)
    assert "\n" not in str(raised.value)
    assert authentication() == {}
