"""Every implementation of a step gives the same steps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch._dynamo.backends.distributed import DDPOptimizer
from torch.nn.parallel import DistributedDataParallel

from pipeline.distributed.process_group import ProcessGroup
from pipeline.precision import arithmetic
from pipeline.store import SampleOrder, Store
from pipeline.train.gradient_probe import GradientProbe
from pipeline.train.trainer import Trainer
from schemas.run import RunConfig
from tests.helpers import needs_compiler
from tests.pipeline.train.test_loop import losses, run, weights

Make = Callable[..., RunConfig]
# Softmax does not see the keys' bias: its gradient is rounding, which Adam would make large.
ADAM = {"eps": 1e-4}
PLAIN = {"compile": "off", "attention_loss": "plain", "optimizer": "plain"}


@pytest.fixture
def plain(run_config: Make, tmp_path: Path) -> Path:
    run(run_config(compute=PLAIN, optimizer=ADAM), tmp_path / "plain")
    return tmp_path / "plain"


@pytest.mark.parametrize(
    "compute",
    [
        {"attention_loss": "fused"},
        {"optimizer": "fused"},
        pytest.param({"compile": "on"}, marks=needs_compiler),
        pytest.param({"compile": "on", "attention_loss": "fused"}, marks=needs_compiler),
    ],
    ids=str,
)
def test_a_run_is_the_plain_run(
    run_config: Make, plain: Path, tmp_path: Path, compute: dict[str, str]
) -> None:
    """Six steps including the termination, at a learning rate that shows every difference."""
    run(run_config(compute={**PLAIN, **compute}, optimizer=ADAM), tmp_path / "fast")
    for row, expected in zip(losses(tmp_path / "fast"), losses(plain), strict=True):
        assert row == pytest.approx(expected, rel=2e-4)
    one, other = weights(tmp_path / "fast"), weights(plain)
    assert one.keys() == other.keys()
    for name, weight in other.items():
        torch.testing.assert_close(one[name], weight, rtol=1e-3, atol=1e-5)


@needs_compiler
def test_the_termination_compiles_nothing(
    run_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Code for blocks without taps was compiled in Phase I, where most blocks have none."""
    compiled: list[int] = []
    step = Trainer.train_step

    def counting(self: Trainer, batch: object) -> torch.Tensor:
        before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        result = step(self, batch)  # type: ignore[arg-type]
        compiled.append(torch._dynamo.utils.counters["stats"]["unique_graphs"] - before)
        return result

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    monkeypatch.setattr(Trainer, "train_step", counting)
    run(run_config(compute={"compile": "on"}), tmp_path / "run")
    assert compiled[0] > 0
    assert compiled[1:] == [0] * 5


@needs_compiler
def test_the_probe_compiles_nothing_and_measures_the_same(
    run_config: Make, random_store: Store
) -> None:
    """Includes batches for which training has compiled a backward pass, whose buffers can be used
    only once, while the probe runs two backward passes."""
    found = []
    for compute in ({"compile": "off"}, {"compile": "on"}):
        torch._dynamo.reset()
        trainer = Trainer(run_config(compute=compute), random_store, ProcessGroup())
        order = SampleOrder(0, random_store.index().samples_per_shard)
        probe = GradientProbe(trainer, random_store, order)
        (batch,) = probe._batches(5)
        for _ in range(2):  # at initialisation every gate is 0
            trainer.train_step(batch)
        before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        found.append(probe.gradient_cosines([0.1, 0.7], 5))
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before
        trainer.close()
    assert found[1] == pytest.approx(found[0], abs=1e-3)


@needs_compiler
def test_ddp_does_not_cut_the_blocks_that_are_compiled(
    run_config: Make, random_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch._dynamo.reset()
    trainer = Trainer(run_config(compute={"compile": "on"}), random_store, ProcessGroup())
    order = SampleOrder(0, random_store.index().samples_per_shard)
    (batch,) = GradientProbe(trainer, random_store, order)._batches(5)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        trainer.wrapped = DistributedDataParallel(trainer.module, bucket_cap_mb=1e-3)
        monkeypatch.setattr(DDPOptimizer, "__init__", lambda *_, **__: pytest.fail("it is cut"))
        trainer.train_step(batch)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    finally:
        trainer.close()
        dist.destroy_process_group()


@needs_compiler
def test_sampling_compiles_nothing(run_config: Make, random_store: Store) -> None:
    """It changes flags of float32 products and restores them."""
    torch._dynamo.reset()
    trainer = Trainer(run_config(compute={"compile": "on"}), random_store, ProcessGroup())
    order = SampleOrder(0, random_store.index().samples_per_shard)
    (batch,) = GradientProbe(trainer, random_store, order)._batches(5)
    trainer.train_step(batch)
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    with arithmetic("tf32"):
        pass
    trainer.train_step(batch)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before
    trainer.close()
