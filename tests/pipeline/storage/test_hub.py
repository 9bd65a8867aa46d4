"""The hub without a network: one failure at once, or the local cache."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import timm
import torch
from huggingface_hub import constants
from safetensors.torch import save_file

from pipeline.autoencoders import Autoencoder
from pipeline.evaluate.features.timm_network import FeatureNetwork
from pipeline.storage import hub
from pipeline.storage.hub import HubUnreachableError, hub_access
from pipeline.teachers import Teacher
from schemas.errors import UserError
from schemas.extract import TeacherConfig

TEACHER = TeacherConfig(
    model="vit_small_patch14_dinov2.lvd142m",
    model_args={"embed_dim": 48, "depth": 1, "num_heads": 2},
)


@pytest.fixture(autouse=True)
def no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache without files, and a hub on a port that nothing listens at."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


def cache_file(folder: Path, repo: str, name: str) -> Path:
    """Place for a file of a repository's newest revision in a cache."""
    root = folder / f"models--{repo.replace('/', '--')}"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text("0" * 40)
    snapshot = root / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    return snapshot / name


@pytest.mark.parametrize("offline", [False, True])
def test_a_teacher_that_is_not_there_fails_at_once(
    offline: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    start = time.monotonic()
    with pytest.raises(UserError) as caught:
        Teacher(TEACHER, resolution=64, layers=(0,))
    assert time.monotonic() - start < 10
    message = str(caught.value)
    assert "\n" not in message
    reason = "HF_HUB_OFFLINE is set" if offline else "http://127.0.0.1:9 cannot be reached"
    for part in (reason, f"not in the cache '{tmp_path / 'cache'}'", "--teacher.weights FILE"):
        assert part in message
    assert message.endswith("--teacher.weights random")
    assert offline == constants.HF_HUB_OFFLINE


def test_an_autoencoder_and_a_network_that_are_not_there_fail_at_once() -> None:
    start = time.monotonic()
    with pytest.raises(UserError, match=r"--autoencoder 'some/vae' .* cannot be reached .*HF_HUB"):
        Autoencoder("some/vae")
    with pytest.raises(UserError, match=r"cannot be reached .*--network-weights FILE"):
        FeatureNetwork("vit_small_patch14_dinov2.lvd142m", "hub")
    assert time.monotonic() - start < 20


def test_a_cached_teacher_is_used_without_the_hub(tmp_path: Path) -> None:
    arguments = {**TEACHER.model_args, "img_size": 518}
    vit = timm.create_model("vit_small_patch14_dinov2", num_classes=0, **arguments)
    torch.nn.init.normal_(vit.cls_token)
    repo = "timm/vit_small_patch14_dinov2.lvd142m"
    save_file(vit.state_dict(), cache_file(tmp_path / "cache", repo, "model.safetensors"))
    teacher = Teacher(TEACHER, resolution=64, layers=(0,))
    assert torch.equal(teacher.vit.cls_token, vit.cls_token)
    assert not constants.HF_HUB_OFFLINE


def test_the_library_is_offline_only_while_it_loads(tmp_path: Path) -> None:
    cache_file(tmp_path / "cache", "a/b", "c").write_text("")
    with hub_access("a/b", ("x", "c")):
        assert constants.is_offline_mode()
    assert not constants.is_offline_mode()
    with pytest.raises(HubUnreachableError), hub_access("a/b", ("x",)):
        pass


@pytest.mark.parametrize("offline", [False, True])
def test_a_hub_that_does_not_answer_is_waited_for_once(
    offline: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests: list[str] = []

    class Silent:
        def head(self, url: str, timeout: float) -> None:
            requests.append(url)
            time.sleep(3)

    monkeypatch.setattr(hub.hub, "get_session", Silent)
    monkeypatch.setattr(hub, "CONNECT_SECONDS", 0.2)
    monkeypatch.setattr(hub, "_failures", {})
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    start = time.monotonic()
    for repo in ("a/b", "c/d", "e/f"):
        reason = "HF_HUB_OFFLINE is set" if offline else r"no answer within 0\.2 seconds"
        with pytest.raises(HubUnreachableError, match=reason), hub_access(repo, ("x",)):
            pass
    assert time.monotonic() - start < 2.5
    assert len(requests) == (0 if offline else 1)
