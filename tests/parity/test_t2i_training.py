"""HASTE's recorded text-to-image training steps, taken by our Trainer: as released, and with the
attention loss counted and the alignment ended."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from pipeline.checkpoints.reference_format import Parts, join_state, split_state
from pipeline.distributed.process_group import ProcessGroup
from pipeline.models import MMDiT
from pipeline.train.noise import NoisePrefetcher, SampleNoise
from pipeline.train.trainer import Trainer
from tests.parity.reference import COSINE_FLOOR, Golden, check_number
from tests.parity.t2i import batch_of, make_store, run_config
from tests.parity.test_reg_training import check_final_sums, check_final_tensors
from tests.parity.test_training import EMA, MODEL, _norm_of_change, state_of

IO, VALUES = "t2i_train_io", "t2i_train_values"


def without_null(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The authors keep the null caption in a file of its own."""
    return {name: tensor for name, tensor in state.items() if name != "null_context"}


def load_recorded(recipes: Golden, trainer: Trainer) -> None:
    parts = split_state(recipes.tensors("t2i_state"))
    for student in (trainer.module.student, trainer.ema.module):
        assert isinstance(student, MMDiT)
        student.load_state_dict({"null_context": student.null_context, **parts.student})
    for projector in (trainer.projectors[0], trainer.projector_emas[0].module):
        projector.load_state_dict(parts.projector)


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
    load_recorded(recipes, trainer)
    return trainer


@pytest.fixture(scope="module")
def run(
    recipes: Golden, t2i_variant: str, tmp_path_factory: pytest.TempPathFactory
) -> SimpleNamespace:
    """All recorded steps; what each returned, and the trainer after the last."""
    records = recipes.values(VALUES)[t2i_variant]["steps"]
    trainer = open_trainer(recipes, t2i_variant, tmp_path_factory.mktemp("t2i"))
    initial = {
        name: tensor.double().clone()
        for name, tensor in without_null(state_of(trainer, average=False)).items()
    }
    results = []
    for step, record in enumerate(records):
        if trainer.aligned and not record["aligned"]:
            trainer.terminate({"trigger": "fixed"})
        draws = recorded_draws(recipes, step)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(NoisePrefetcher, "__call__", lambda *_, draws=draws: draws)
            *sums, norm = trainer.train_step(batch_of(recipes, step)).tolist()
        states = [without_null(state_of(trainer, average=average)) for average in (False, True)]
        changes = [_norm_of_change(state, initial) for state in states]
        batch = trainer.config.global_batch
        losses = {n: v / batch for n, v in zip(trainer.module.losses, sums, strict=True)}
        results.append(SimpleNamespace(losses=losses, norm=norm, changes=changes))
    trainer.close()
    model, ema = states
    return SimpleNamespace(
        variant=t2i_variant,
        records=records,
        results=results,
        initial=initial,
        model=model,
        ema=ema,
        config=trainer.config,
    )


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
    for record, result in zip(run.records, run.results, strict=True):
        what = f"step {record['step']}: gradient norm"
        check_number(what, result.norm, record["grad_norm_before_clip"])


def test_change_of_all_weights_after_every_step(run: SimpleNamespace) -> None:
    for record, result in zip(run.records, run.results, strict=True):
        model, ema = result.changes
        assert model == pytest.approx(record["model_delta_l2_all"], rel=MODEL)
        assert ema == pytest.approx(record["ema_delta_l2_all"], rel=EMA)


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
