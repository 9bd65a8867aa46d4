"""REG's recorded training steps, taken by our Trainer: label drop, AdamW, clipping, averages."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from pipeline.distributed.process_group import ProcessGroup
from pipeline.store import Batch, Store
from pipeline.train.noise import SampleNoise
from pipeline.train.trainer import Trainer
from schemas.run import RunConfig
from tests.parity.reference import COSINE_FLOOR, Golden, check_number
from tests.parity.reg import alignment_config, manifest_of, student_config
from tests.parity.training import (
    check_changes,
    check_final_sums,
    check_final_tensors,
    check_gradient_norms,
    load_recorded,
    optimizer_options,
    take_steps,
)


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
            "optimizer": optimizer_options(train),
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
    store = Store("memory://parity", manifest_of(recipes))
    trainer = Trainer(run_config(recipes), store, ProcessGroup())
    load_recorded(trainer, recipes.tensors("reg_state"))
    return take_steps(
        trainer,
        recipes.values("reg_train_values")["steps"],
        lambda step: batch_of(recipes, step),
        lambda step: recorded_draws(recipes, step),
    )


def test_losses_of_every_step(run: SimpleNamespace) -> None:
    config = run.config
    for record, result in zip(run.records, run.results, strict=True):
        step = f"step {record['step']}:"
        image, feature, token = (
            result.losses[name] for name in ("denoising", "feature", "class_token")
        )
        check_number(f"{step} image", image, record["denoise"])
        check_number(f"{step} class token", token, record["cls_denoise"])
        check_number(f"{step} feature loss", feature, record["proj"], floor=COSINE_FLOOR)
        total = image + config.alignment.feature_weight * feature
        total += config.diffusion.class_weight * token
        check_number(f"{step} total", total, record["total"])
        assert result.condition.tolist() == record["labels_after_drop"]


def test_gradient_norm_of_every_step(run: SimpleNamespace) -> None:
    check_gradient_norms(run)


def test_change_of_all_weights_after_every_step(run: SimpleNamespace) -> None:
    check_changes(run)


@pytest.mark.parametrize("kind", ["model", "ema"])
def test_final_sums_of_every_parameter(recipes: Golden, run: SimpleNamespace, kind: str) -> None:
    expected = recipes.values("reg_train_values")["final_parameters"]
    assert {name.split(" [")[0] for name in expected} == getattr(run, kind).keys()
    check_final_sums(run, expected, kind)


def test_final_tensors(recipes: Golden, run: SimpleNamespace) -> None:
    sums = recipes.values("reg_train_values")["final_parameters"]
    assert check_final_tensors(recipes, run, "reg_train_io", sums)
