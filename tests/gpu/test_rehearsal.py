"""No wait, no race and no tensor on the wrong device on a GPU, seen without one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.autoencoders import Autoencoder
from pipeline.distributed.process_group import ProcessGroup
from pipeline.evaluate.evaluator import evaluate
from pipeline.extract.encoder import _pinned_copy
from pipeline.models import make_student
from pipeline.sampling.generate import draw_images
from pipeline.store import Store
from pipeline.train.loop import train
from schemas.diffusion import SamplerConfig
from schemas.evaluate import EvaluateConfig
from schemas.student import StudentConfig
from tests.encoded import encode
from tests.gpu.fake_gpu import CUDA, FakeGpu, needs_cuda_build
from tests.gpu.steps import RUN, open_steps, reg, run_config, text

pytestmark = needs_cuda_build

MICRO = {"workers": {"micro_batch": 3}}
PLAIN = {"compute": {"attention_loss": "plain", "optimizer": "plain"}}
IREPA = {"projector": "conv", "projector_kernel": 3, "normalisation": "spatial"}
SECOND = {"feature_weight": 0.25, "feature_depth": 1, "student_layers": [2], "teacher_layers": [4]}
RECIPES = {
    "alignment": {
        **IREPA,
        "normalisation_strength": 0.6,
        "others": [SECOND],
        "warmup": {"kind": "cosine", "steps": 2},
        "termination": {"ramp": {"steps": 2}},
    }
}
VANILLA = {"alignment": {"feature_weight": 0, "attention_weight": 0, "termination": None}}


def rehearse(store: Store, changes: dict[str, Any]) -> FakeGpu:
    """Phase I, the probe, the termination and Phase II. Waits of the steps are left in the log;
    the other parts are held to theirs here."""
    with FakeGpu() as gpu, open_steps(store, CUDA, changes) as steps:
        gpu.waits.clear()  # weights and teacher were copied
        result = steps.take(2)
        assert result.device == CUDA
        assert all(p.device == CUDA for p in steps.trainer.module.parameters())
        if steps.trainer.aligned:
            before = len(gpu.waits)
            steps.probe.gradient_cosines([0.1], 2)
            assert len({event.place for event in gpu.waits[before:]}) == 1  # its results
            del gpu.waits[before:]
            steps.terminate()
            assert all(event.inside("release") for event in gpu.waits[before:])
            del gpu.waits[before:]
        steps.take(1)
    assert gpu.operations > 1000
    return gpu


@pytest.mark.parametrize(
    ("cut", "options", "changes"),
    [
        ("maps", {}, {}),
        ("maps", {"codec": "bfloat16"}, MICRO),
        ("qk", {}, MICRO),
        ("activations", {"precision": "bfloat16"}, MICRO),
        ("activations", {"codec": "int8"}, {**PLAIN, "student": {"model": "SiT-S/4"}}),
        ("image", {}, MICRO),
        ("maps", {}, RECIPES),
        ("activations", {}, RECIPES),
        ("maps", {}, VANILLA),
        ("maps", {}, {"student": {"model": "DiT-S/2"}}),
    ],
    ids=lambda value: str(value).translate(str.maketrans("", "", "{}' ")),
)
def test_steps(
    stores: Callable[..., Store], cut: str, options: dict[str, Any], changes: dict[str, Any]
) -> None:
    gpu = rehearse(stores(cut, **options), changes)
    assert gpu.waits == []
    assert gpu.races == []


@pytest.mark.parametrize("changes", [{}, MICRO, VANILLA], ids=["one part", "parts", "no teacher"])
def test_steps_of_reg(stores: Callable[..., Store], changes: dict[str, Any]) -> None:
    store, options = reg(stores("maps"))
    gpu = rehearse(store, {**options, **changes})
    assert gpu.waits == []
    assert gpu.races == []


@pytest.mark.parametrize("changes", [{}, MICRO, VANILLA], ids=["one part", "parts", "no teacher"])
def test_steps_with_captions(stores: Callable[..., Store], changes: dict[str, Any]) -> None:
    store, options = text(stores("maps"))
    gpu = rehearse(store, {**options, **changes})
    assert gpu.waits == []
    assert gpu.races == []


NETWORK = {"network": "resnet10t", "network_weights": "random", "network_size": 32}
SAMPLES = {
    "every": 4,
    "batch_size": 2,
    "per_class": 1,
    "classes": [1],
    "sampler": {"method": "ode", "steps": 1},
}
TRIGGERS = {
    "fixed": {"step": 2, "ramp": {"steps": 2}},
    "gradient_cosine": {"start": 1, "every": 1, "samples": 2, "times": [0.1], "threshold": 1},
    "residual_plateau": {"start": 2, "every": 1},
}


@pytest.mark.parametrize("kind", TRIGGERS)
def test_run(
    stores: Callable[..., Store], tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows, the trigger, checkpoints and validation may wait, between steps only."""
    monkeypatch.setattr("pipeline.train.finite.NEVER", 0)  # all that comes back is 0
    store = stores("maps")
    changes: dict[str, Any] = {
        "steps": 3,
        "log_every": 2,
        "alignment": {"termination": {"kind": kind, **TRIGGERS[kind]}},
    }
    if kind == "fixed":
        reference = tmp_path / "reference.npz"
        options = {"reference": store.url, "save_reference": str(reference), **NETWORK}
        evaluate(EvaluateConfig.model_validate(options), "cpu")
        evaluation = {"images": 2, "reference": str(reference), **NETWORK}
        changes["samples"] = {**SAMPLES, "evaluate": evaluation}
    with FakeGpu() as gpu:
        group = ProcessGroup(device=CUDA)
        summary = train(run_config(store, changes), tmp_path, lambda step, write: None, group=group)
    assert summary["termination_step"] == (1 if kind == "gradient_cosine" else 2)
    assert gpu.waits_inside("train_step") == []
    assert gpu.races == []
    parts = ("_log_row", "_terminate_if_due", "_save", "_validate_if_due", "_summarise")
    steps = [event for event in gpu.waits if event.inside("run_to_end")]
    assert [event for event in steps if not any(map(event.inside, parts))] == []


@pytest.mark.parametrize("cut", ["maps", "qk", "activations", "image"])
def test_extraction(tmp_path: Path, cut: str) -> None:
    """The thread that encodes never waits; that which writes waits once a batch."""
    with FakeGpu() as gpu:
        encode(tmp_path / "store", cut=cut, device="cuda", batch_size=3)
    waits = gpu.waits_inside("encode_shard")
    assert waits == []
    written = [event for event in gpu.waits if event.inside("_write")]
    assert [event.what for event in written] == ["event.synchronize"] * 3
    assert gpu.races == []


def test_stored_latents_are_not_copied() -> None:
    """Latents of the data set are on the CPU already, where streams do not exist."""
    mean = torch.zeros(2, 4, 8, 8)
    with FakeGpu():
        assert _pinned_copy(mean) is mean


@pytest.mark.parametrize(
    ("method", "class_token"),
    [*((method, None) for method in ("sde", "ode", "ode_heun", "ddpm")), ("sde", 20), ("ode", 20)],
)
def test_samplers(method: str, class_token: int | None) -> None:
    """Only the finished images are waited for."""
    family = "DiT" if method == "ddpm" else "SiT"
    options = {"model": f"{family}-S/2", "class_token": class_token}
    config = StudentConfig.model_validate({**RUN["student"], **options})
    sampler = SamplerConfig.model_validate({"method": method, "steps": 3, "guidance": 1.5})
    with FakeGpu() as gpu:
        student = make_student(config).to(CUDA).eval()
        autoencoder = Autoencoder("demo").to(CUDA)
        gpu.waits.clear()
        images = draw_images(student, autoencoder, [1, 2, 3], sampler, precision="bfloat16")
    assert images.shape == (3, 3, 32, 32)
    assert {event.place[0].split(":")[1] for event in gpu.waits} == {"draw_images"}
    assert gpu.races == []


def test_evaluation(stores: Callable[..., Store]) -> None:
    """Features wait for their batch; nothing is on the wrong device."""
    url = stores("image").url
    options = {"reference": url, "samples": url, "batch_size": 4, **NETWORK}
    with FakeGpu() as gpu:
        found = evaluate(EvaluateConfig.model_validate(options), "cuda")
    assert found is not None
    assert found.samples == 8
    assert gpu.races == []
