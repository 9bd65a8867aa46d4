"""Issue 3, parity 3: the recorded training steps, taken by our Trainer."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pipeline.distributed.process_group import ProcessGroup
from pipeline.store import Batch, Store
from pipeline.train.noise import SampleNoise
from pipeline.train.trainer import Trainer
from schemas.run import RunConfig
from schemas.store import Manifest
from tests.parity.reference import COSINE_FLOOR, Golden, check_number
from tests.parity.students import alignment_config, student_config, teacher_logits
from tests.parity.training import (
    check_changes,
    check_final_sums,
    check_final_tensors,
    check_gradient_norms,
    load_recorded,
    optimizer_options,
    recorded_noise,
    take_steps,
)
from tests.stores import random_manifest


def manifest_of(golden: Golden) -> Manifest:
    """Of a store with the recorded teacher's shapes and the recorded latent scale."""
    student, io = student_config(golden), golden.tensors("loss_io")
    train = golden.configs["train"]
    rows = student.latent_size // student.size.patch_size
    blank = random_manifest(samples=1, shard_size=1)
    layers = golden.configs["loss"]["teacher_layers_used"]
    name, stream = blank.teacher_stream()
    teacher = stream.teacher.model_copy(
        update={
            "width": io["teacher_features"].shape[-1],
            "heads": io["teacher_attn_q"].shape[2],
            "depth": max(layers) + 1,
            "grid": (rows, rows),
            "layers": tuple(layers),
        }
    )
    autoencoder = blank.autoencoder.model_copy(
        update={
            "scaling_factor": train["latents_scale"],
            "shift_factor": -train["latents_bias"] / train["latents_scale"],
            "latent_shape": student.latent_shape,
        }
    )
    streams = {**blank.streams, name: stream.model_copy(update={"teacher": teacher})}
    # the recorded labels were dropped beforehand: "no class" stands among them
    dataset = blank.dataset.model_copy(update={"num_classes": student.num_classes + 1})
    return blank.model_copy(
        update={"streams": streams, "autoencoder": autoencoder, "dataset": dataset}
    )


def run_config(golden: Golden) -> RunConfig:
    train = golden.configs["train"]
    return RunConfig.model_validate(
        {
            "steps": train["steps"],
            "global_batch": train["batch"],
            "ema_decay": train["ema_decay"],
            "precision": "float32",
            "student": student_config(golden),
            "diffusion": {"path": train["path"]},
            "alignment": {
                **alignment_config(golden, "train").model_dump(),
                "termination": {"kind": "fixed", "step": train["early_stop_point"]},
            },
            "optimizer": optimizer_options(train),
        }
    )


def batch_of(golden: Golden, step: int) -> Batch:
    """Moments and labels of a step; the teacher's targets, the same at every step."""
    io = golden.tensors("train_io")
    mean, std = io["moments"][step].chunk(2, dim=1)
    features = golden.tensors("loss_io")["teacher_features"]
    attention = torch.softmax(teacher_logits(golden), dim=-1)
    columns = {
        "latents": {"mean": mean, "std": std, "label": io["labels"][step]},
        "maps": {"features": features, "class_token": features[:, 0], "attention": attention},
    }
    return Batch(
        step=step,
        positions=np.arange(len(mean)),
        columns={s: {n: t.numpy() for n, t in c.items()} for s, c in columns.items()},
    )


@pytest.fixture(scope="module")
def run(golden: Golden) -> SimpleNamespace:
    io, config = golden.tensors("train_io"), run_config(golden)
    trainer = Trainer(config, Store("memory://parity", manifest_of(golden)), ProcessGroup())
    load_recorded(trainer, golden.tensors("sit_state"))

    def draws_of(step: int) -> SampleNoise:
        return SampleNoise(
            t=io["t"][step],
            drop_label=torch.zeros(config.global_batch, dtype=torch.bool),
            posterior=io["posterior_eps"][step],
            noise=io["noise"][step],
        )

    records = golden.values("train_values")["steps"]
    return take_steps(trainer, records, lambda step: batch_of(golden, step), draws_of)


def test_latents_of_the_first_step(golden: Golden) -> None:
    # at t = 0 a linear path's noisy latents are the latents
    io, config = golden.tensors("train_io"), run_config(golden)
    trainer = Trainer(config, Store("memory://parity", manifest_of(golden)), ProcessGroup())
    zeros = torch.zeros(config.global_batch)
    noise = torch.zeros_like(io["noise"][0])
    draws = SampleNoise(
        t=zeros, drop_label=zeros.bool(), posterior=io["posterior_eps"][0], noise=noise
    )
    with recorded_noise(draws):
        inputs = trainer.inputs(batch_of(golden, 0))
    golden.check("train_io", "latents_step0", inputs.noisy)
    assert torch.equal(inputs.condition, io["labels"][0])


def test_losses_of_every_step(golden: Golden, run: SimpleNamespace) -> None:
    train = golden.configs["train"]
    for record, result in zip(run.records, run.results, strict=True):
        step = f"step {record['step']}:"
        denoising, feature, attention = (
            result.losses[name] for name in ("denoising", "feature", "attention")
        )
        check_number(f"{step} denoising loss", denoising, record["denoise"])
        check_number(f"{step} feature loss", feature, record["proj"], floor=COSINE_FLOOR)
        check_number(f"{step} attention loss", attention, record["attn"])
        total = denoising + train["proj_coeff"] * feature + train["attn_coeff"] * attention
        check_number(f"{step} total", total, record["total"])


def test_gradient_norm_of_every_step(run: SimpleNamespace) -> None:
    check_gradient_norms(run)


def test_change_of_all_weights_after_every_step(run: SimpleNamespace) -> None:
    check_changes(run)


@pytest.mark.parametrize("kind", ["model", "ema"])
def test_final_sums_of_every_parameter(golden: Golden, run: SimpleNamespace, kind: str) -> None:
    expected = golden.values("train_values")["final_parameters"]
    assert {name.split(" [")[0] for name in expected} == getattr(run, kind).keys()
    check_final_sums(run, expected, kind)


def test_final_tensors(golden: Golden, run: SimpleNamespace) -> None:
    sums = golden.values("train_values")["final_parameters"]
    assert check_final_tensors(golden, run, "train_io", sums, rounding=False)
