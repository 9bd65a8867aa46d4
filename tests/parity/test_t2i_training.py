"""HASTE's recorded text-to-image training steps, taken by our Trainer: as released, and with the
attention loss counted and the alignment ended."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pipeline.checkpoints.reference_format import Parts, join_state
from pipeline.distributed.process_group import ProcessGroup
from pipeline.models import MMDiT
from pipeline.train.noise import SampleNoise
from pipeline.train.trainer import Trainer
from tests.parity.reference import COSINE_FLOOR, Golden, check_number
from tests.parity.t2i import batch_of, make_store, run_config
from tests.parity.training import (
    check_changes,
    check_final_sums,
    check_final_tensors,
    check_gradient_norms,
    load_recorded,
    take_steps,
)

IO, VALUES = "t2i_train_io", "t2i_train_values"


def recorded_draws(recipes: Golden, step: int) -> SampleNoise:
    io = recipes.tensors(IO)
    return SampleNoise(
        t=io["t"][step],
        drop_label=torch.ones(len(io["t"][step]), dtype=torch.bool),  # of no effect on captions
        posterior=io["posterior_eps"][step],
        noise=io["noise"][step],
    )


def open_trainer(recipes: Golden, variant: str, folder: Path) -> Trainer:
    trainer = Trainer(
        run_config(recipes, variant), make_store(recipes, folder / "store"), ProcessGroup()
    )
    assert isinstance(trainer.module.student, MMDiT)
    load_recorded(trainer, recipes.tensors("t2i_state"))
    return trainer


@pytest.fixture(scope="module")
def run(
    recipes: Golden, t2i_variant: str, tmp_path_factory: pytest.TempPathFactory
) -> SimpleNamespace:
    run = take_steps(
        open_trainer(recipes, t2i_variant, tmp_path_factory.mktemp("t2i")),
        recipes.values(VALUES)[t2i_variant]["steps"],
        lambda step: batch_of(recipes, step),
        lambda step: recorded_draws(recipes, step),
    )
    run.variant = t2i_variant
    return run


def test_losses_of_every_step(run: SimpleNamespace) -> None:
    alignment = run.config.alignment
    for record, result in zip(run.records, run.results, strict=True):
        step, losses = f"step {record['step']}:", result.losses
        check_number(f"{step} denoising", losses["denoising"], record["denoise"])
        check_number(f"{step} feature loss", losses["feature"], record["proj"], floor=COSINE_FLOOR)
        counted = record["attn"] if alignment.attention_weight else 0.0
        check_number(f"{step} attention loss", losses["attention"], counted)
        total = losses["denoising"] + alignment.feature_weight * losses["feature"]
        total += alignment.attention_weight * losses["attention"]
        check_number(f"{step} total", total, record["total"])


def test_gradient_norm_of_every_step(run: SimpleNamespace) -> None:
    check_gradient_norms(run)


def test_change_of_all_weights_after_every_step(run: SimpleNamespace) -> None:
    check_changes(run)


@pytest.mark.parametrize("kind", ["model", "ema"])
def test_final_sums_of_every_parameter(recipes: Golden, run: SimpleNamespace, kind: str) -> None:
    expected = recipes.values(VALUES)[run.variant]["final_parameters"]
    # the position table is a buffer here as there: it has no average
    names = {name.split(" [")[0] for name in expected}
    assert names == getattr(run, kind).keys() - {"pos_embed"}
    check_final_sums(run, expected, kind)


def test_final_tensors(recipes: Golden, run: SimpleNamespace) -> None:
    sums = recipes.values(VALUES)[run.variant]["final_parameters"]
    check_final_tensors(recipes, run, IO, sums, f"{run.variant}.")


def test_first_step(recipes: Golden, t2i_variant: str, tmp_path: Path) -> None:
    """Inputs, outputs, attention and gradients of the first step."""
    io, values = recipes.tensors(IO), recipes.values(VALUES)
    trainer = open_trainer(recipes, t2i_variant, tmp_path)
    module, batch = trainer.module, batch_of(recipes, 0)
    inputs = trainer.inputs(batch, recorded_draws(recipes, 0))
    recipes.check(IO, "step0.model_input", inputs.noisy)
    assert torch.equal(inputs.condition, io["contexts"][io["context_index"][0]])
    with torch.no_grad():
        out = module.student(inputs.noisy, inputs.time, inputs.condition, module.taps)
        recipes.check(IO, "step0.velocity", out.prediction, strict=True)
        recipes.check(IO, "step0.projected", module.projector(out.features), strict=True)
    if out.attended:
        rows = out.attention_logits[0][:, :, io["attn_rows"]]
        recipes.check(IO, "step0.attn_logits_rows_sample0", rows, strict=True)
    losses = trainer.losses(module, inputs, trainer.targets_of(batch))
    (trainer.total(losses) / trainer.config.global_batch).backward()
    gradients = join_state(
        Parts(
            *(
                {n: p.grad for n, p in m.named_parameters()}
                for m in (module.student, module.projector)
            )
        )
    )
    norms = values[t2i_variant]["step0_grad_l2_per_parameter"]
    assert gradients.keys() == norms.keys()
    for name, gradient in gradients.items():
        check_number(f"gradient norm of {name}", gradient.double().norm(), norms[name])
    prefix = f"grad0.{t2i_variant}."
    for name in (name for name in io if name.startswith(prefix)):
        recipes.check(IO, name, gradients[name.removeprefix(prefix)])
    trainer.close()
