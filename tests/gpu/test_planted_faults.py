"""The rehearsal finds faults: each is planted, one at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

import pipeline.extract.encoder as encoder
import pipeline.sampling.generate as generate
import pipeline.targets.sources as sources
import pipeline.train.device_transfer as device_transfer
import pipeline.train.trainer as trainer
from pipeline.models import make_student
from pipeline.models.ema import Ema
from pipeline.models.sit import SiT
from pipeline.store import Store
from pipeline.targets.cuts import encode_values
from pipeline.train.inputs import InputBuilder
from schemas.diffusion import SamplerConfig
from schemas.student import StudentConfig
from tests.encoded import encode
from tests.gpu.fake_gpu import CUDA, FakeGpu, Stream, needs_cuda_build
from tests.gpu.steps import RUN, open_steps

pytestmark = needs_cuda_build

Patch = tuple[Any, str, Callable[..., Any]]
total_norm = torch.nn.utils.get_total_norm
forward = SiT.forward
build = InputBuilder.build


def norm_is_read(gradients: Any) -> Tensor:
    norm = total_norm(gradients)
    assert float(norm) == 0  # in the rehearsal
    return norm


def table_on_the_cpu(self: SiT, *arguments: Any) -> Any:
    self.pos_embed = self.pos_embed.cpu()
    return forward(self, *arguments)


def layers_by_a_list(self: Any, name: str, columns: Any, layers: Tensor) -> Tensor:
    decode = self._decoders[name]
    return decode({part: columns[part][:, [0, 1]] for part in decode.names.values()}).float()


def average_on_the_cpu(self: Ema, module: torch.nn.Module, *_: object) -> None:
    for average, weight in zip(self.module.parameters(), module.parameters(), strict=True):
        average.data.lerp_(weight.detach().cpu().to(CUDA), 0.1)


STEP_FAULTS: dict[str, tuple[Patch, Literal["wait", "race", "device"]]] = {
    "a norm is read": ((torch.nn.utils, "get_total_norm", norm_is_read), "wait"),
    "pageable copies": (
        (
            device_transfer.DevicePrefetcher,
            "__call__",
            lambda self, tensors: {n: t.to(self.device) for n, t in tensors.items()},
        ),
        "wait",
    ),
    "blocking copies": (
        (
            device_transfer.DevicePrefetcher,
            "__call__",
            lambda self, tensors: {n: t.pin_memory().to(CUDA) for n, t in tensors.items()},
        ),
        "wait",
    ),
    "an index from a list": ((sources.MapsTargets, "decode_layers", layers_by_a_list), "wait"),
    "a boolean mask": ((trainer.Trainer, "total", lambda self, x: x[x > 0].sum()), "wait"),
    "an average on the CPU": ((Ema, "update", average_on_the_cpu), "wait"),
    "no wait_stream": ((Stream, "wait_stream", lambda self, other: None), "race"),
    "no record_stream": ((FakeGpu, "_record_stream", lambda self, tensor, stream: None), "race"),
    "a buffer on the CPU": ((SiT, "forward", table_on_the_cpu), "device"),
    "times on the CPU": (
        (
            InputBuilder,
            "build",
            lambda self, *args: build(self, *args)._replace(time=torch.zeros(4)),
        ),
        "device",
    ),
}


@pytest.mark.parametrize("name", STEP_FAULTS)
def test_fault_in_a_step(
    stores: Callable[..., Store], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    patch, kind = STEP_FAULTS[name]
    store = stores("maps")
    monkeypatch.setattr(*patch)
    with FakeGpu() as gpu, open_steps(store, CUDA) as steps:
        gpu.waits.clear()
        if kind == "device":
            with pytest.raises(RuntimeError, match=r"(?i)device"):
                steps.take(1)
            return
        steps.take(1)
    assert bool(gpu.waits_inside("train_step")) == (kind == "wait")
    assert bool(gpu.races) == (kind == "race")


def test_fault_in_the_extraction(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoder, "encode_unchecked", encode_values)
    with FakeGpu() as gpu:
        encode(tmp_path_factory.mktemp("store") / "a", cut="activations", device="cuda")
    assert len(gpu.waits_inside("check_finite")) == 2  # of the cut and of the class tokens


def test_fault_in_a_sampler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate, "_to_device", lambda tensor, device: tensor.to(device))
    config = SamplerConfig.model_validate({"method": "sde", "steps": 3})
    with FakeGpu() as gpu:
        student = make_student(StudentConfig.model_validate(RUN["student"])).to(CUDA)
        gpu.waits.clear()
        generate.draw_latents(student, [1, 2], config)
    assert len(gpu.waits) == 1  # labels; noise is drawn into pinned memory
