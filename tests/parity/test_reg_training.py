"""REG's recorded training steps, taken by our Trainer: label drop, AdamW, clipping, averages."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from pipeline.checkpoints.reference_format import split_state
from pipeline.distributed.process_group import ProcessGroup
from pipeline.store import Batch, Store
from pipeline.train.noise import NoisePrefetcher, SampleNoise
from pipeline.train.trainer import Trainer
from schemas.run import RunConfig
from tests.parity.reference import COSINE_FLOOR, Golden, check_close, check_number
from tests.parity.reg import alignment_config, manifest_of, student_config
from tests.parity.test_training import EMA, MODEL, NOISE, _norm_of_change, _third, state_of


def run_config(recipes: Golden) -> RunConfig:
    train = recipes.values("reg_train_values")["config"]
    return RunConfig.model_validate(
        {
            "steps": train["steps"],
            "global_batch": train["batch"],
            "ema_decay": train["ema_decay"],
            "precision": "float32",
            "student": student_config(recipes),
            "diffusion": {"path": train["path"], "class_weight": train["cls_coeff"]},
            "alignment": {
                **alignment_config(recipes).model_dump(),
                "feature_weight": train["proj_coeff"],
            },
            "optimizer": {
                "learning_rate": train["lr"],
                "betas": train["betas"],
                "weight_decay": train["weight_decay"],
                "eps": train["eps"],
                "max_grad_norm": train["max_grad_norm"],
            },
        }
    )


def batch_of(recipes: Golden, step: int) -> Batch:
    io = recipes.tensors("reg_train_io")
    mean, std = io["moments"][step].chunk(2, dim=1)
    features, tokens = io["patch_features"][step], io["cls_clean"][step]
    columns = {
        "latents": {"mean": mean, "std": std, "label": io["labels"][step]},
        "maps": {"features": features, "class_token": features[:, 0]},
        "class": {"class_token": tokens},
    }
    return Batch(
        step=step,
        positions=np.arange(len(mean)),
        columns={s: {n: t.numpy() for n, t in c.items()} for s, c in columns.items()},
    )


def recorded_draws(recipes: Golden, step: int) -> SampleNoise:
    io = recipes.tensors("reg_train_io")
    return SampleNoise(
        t=io["t"][step],
        drop_label=io["drop_uniform"][step] < recipes.configs["reg"]["class_dropout_prob"],
        posterior=io["posterior_eps"][step],
        noise=io["noise"][step],
        class_noise=io["cls_noise"][step],
    )


@pytest.fixture(scope="module")
def run(recipes: Golden) -> SimpleNamespace:
    """All recorded steps; what each returned, and the trainer after the last."""
    config, records = run_config(recipes), recipes.values("reg_train_values")["steps"]
    trainer = Trainer(config, Store("memory://parity", manifest_of(recipes)), ProcessGroup())
    parts = split_state(recipes.tensors("reg_state"))
    for student in (trainer.module.student, trainer.ema.module):
        student.load_state_dict(parts.student)
    for projector in (trainer.projectors[0], trainer.projector_emas[0].module):
        projector.load_state_dict(parts.projector)
    initial = {name: t.double().clone() for name, t in state_of(trainer, average=False).items()}
    results = []
    for step in range(len(records)):
        draws = recorded_draws(recipes, step)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(NoisePrefetcher, "__call__", lambda *_, draws=draws: draws)
            labels = trainer.inputs(batch_of(recipes, step)).condition.tolist()
            *sums, norm = trainer.train_step(batch_of(recipes, step)).tolist()
        states = [state_of(trainer, average=average) for average in (False, True)]
        changes = [_norm_of_change(state, initial) for state in states]
        losses = dict(zip(trainer.module.losses, sums, strict=True))
        results.append(SimpleNamespace(losses=losses, norm=norm, changes=changes, labels=labels))
    trainer.close()
    model, ema = states
    return SimpleNamespace(
        records=records, results=results, initial=initial, model=model, ema=ema, config=config
    )


def test_losses_of_every_step(run: SimpleNamespace) -> None:
    batch, config = run.config.global_batch, run.config
    for record, result in zip(run.records, run.results, strict=True):
        step = f"step {record['step']}:"
        image, feature, token = (
            result.losses[name] / batch for name in ("denoising", "feature", "class_token")
        )
        check_number(f"{step} image", image, record["denoise"])
        check_number(f"{step} class token", token, record["cls_denoise"])
        check_number(f"{step} feature loss", feature, record["proj"], floor=COSINE_FLOOR)
        total = image + config.alignment.feature_weight * feature
        total += config.diffusion.class_weight * token
        check_number(f"{step} total", total, record["total"])
        assert result.labels == record["labels_after_drop"]


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
    expected = recipes.values("reg_train_values")["final_parameters"]
    assert {name.split(" [")[0] for name in expected} == getattr(run, kind).keys()
    check_final_sums(run, expected, kind)


def check_final_sums(run: SimpleNamespace, expected: dict[str, Any], kind: str) -> None:
    """Sum and norm of every final parameter, and of its change."""
    for name, numbers in expected.items():
        if NOISE.fullmatch(name):
            continue
        final, start = (_third(state, name).double() for state in (getattr(run, kind), run.initial))
        allowed = _allowed(numbers, kind)
        root = final.numel() ** 0.5  # an error of a given norm moves a sum by at most that times it
        for_sum = allowed * (root if kind == "ema" else min(root, 10))
        for what, ours, slack in (
            ("minus_init_l2", (final - start).norm(), allowed),
            ("minus_init_sum", (final - start).sum(), for_sum),
            ("l2", final.norm(), allowed),
            ("sum", final.sum(), for_sum),
        ):
            theirs = numbers[f"{kind}_{what}"]
            assert abs(ours.item() - theirs) <= slack, f"{name}: {kind}_{what}"


def test_final_tensors(recipes: Golden, run: SimpleNamespace) -> None:
    sums = recipes.values("reg_train_values")["final_parameters"]
    assert check_final_tensors(recipes, run, "reg_train_io", sums)


def check_final_tensors(
    recipes: Golden, run: SimpleNamespace, file: str, sums: dict[str, Any], infix: str = ""
) -> int:
    """The final parameters that ``file`` holds; their number."""
    io = recipes.tensors(file)
    pattern = rf"final_(model|ema)\.{re.escape(infix)}(.*)"
    names = [name for name in io if re.match(pattern, name)]
    for name in names:
        kind, parameter = re.fullmatch(pattern, name).groups()
        thirds = [p for p in sums if p.split(" [")[0] == parameter and not NOISE.fullmatch(p)]
        for third in thirds:
            ours, theirs = _third(getattr(run, kind), third), _third({parameter: io[name]}, third)
            # no element strays further than the whole change may, or than both may by rounding
            allowed = _allowed(sums[third], kind)
            check_close(name, ours, theirs, allowed + 2 * recipes.noise(file, name))
    return len(names)


def _allowed(numbers: dict[str, float], kind: str) -> float:
    """A share of the whole change, and the rounding of the reference itself: that of a large label
    table is a third of its average's change."""
    change = numbers[f"{kind}_minus_init_l2"]
    rounding = abs(change - numbers["float64_rerun"][f"{kind}_minus_init_l2"])
    return {"model": MODEL, "ema": EMA}[kind] * change + 3 * rounding
