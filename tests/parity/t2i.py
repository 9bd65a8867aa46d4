"""The recorded text-to-image student and the data of its training steps, in our classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save

from pipeline.store import Batch, Store
from pipeline.store.captions import describe_null, write_null
from pipeline.store.reading.caption_reader import CAPTION, DROPPED
from schemas.run import RunConfig
from schemas.store import Manifest
from schemas.student import StudentConfig
from tests.parity.reference import Golden
from tests.stores import COMPUTE, TEXT_ENCODER, random_manifest


def student_config(recipes: Golden) -> StudentConfig:
    t2i = recipes.configs["t2i"]
    return StudentConfig(
        model=f"MMDiT-{t2i['depth']}/{t2i['patch_size']}",
        latent_size=t2i["input_size"],
        latent_channels=t2i["in_channels"],
        width=t2i["hidden_size"],
        heads=t2i["num_heads"],
        text_tokens=t2i["context_tokens"],
        text_width=t2i["context_dim"],
    )


def run_config(recipes: Golden, variant: str) -> RunConfig:
    values = recipes.values("t2i_train_values")
    train, stop = values["config"], values[variant]["early_stop_point"]
    t2i = recipes.configs["t2i"]
    return RunConfig.model_validate(
        {
            "steps": train["steps"],
            "global_batch": train["batch"],
            "ema_decay": train["ema_decay"],
            "precision": "float32",
            "student": student_config(recipes),
            "diffusion": {"path": train["path"], "time": train["weighting"]},
            "alignment": {
                "feature_weight": train["proj_coeff"],
                # the released script overwrites its attention loss with 0
                "attention_weight": train["attn_coeff"] * values[variant]["attention_in_total"],
                "feature_depth": t2i["encoder_depth"],
                "student_layers": train["student_blocks_used"],
                "teacher_layers": train["teacher_layers_used"],
                "projector_width": t2i["projector_dim"],
                "termination": None if stop is None else {"kind": "fixed", "step": stop},
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


def make_store(recipes: Golden, folder: Path) -> Store:
    """A store without samples that has the recorded teacher's sizes, the recorded latent scale and
    null caption, and one caption an image."""
    student, train = student_config(recipes), recipes.values("t2i_train_values")["config"]
    io = recipes.tensors("t2i_train_io")
    blank = random_manifest(samples=1, shard_size=1)
    name, stream = blank.teacher_stream()
    layers = train["teacher_layers_used"]
    teacher = stream.teacher.model_copy(
        update={
            "width": io["teacher_features"].shape[-1],
            "heads": io["teacher_attn_q"].shape[2],
            "depth": max(layers) + 1,
            "grid": student.grid,
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
    tokens, width = student.text_shape
    data = save({"embeddings": io["contexts"][-1].contiguous()})
    text: dict[str, Any] = {
        "kind": "text",
        "keeps": "embeddings",
        "columns": {
            "caption0": {"shape": (tokens, width), "codec": "float32"},
            "lengths": {"shape": (1,), "codec": "int64"},
        },
        "captions": 1,
        "captions_sha256": "4" * 64,
        "encoder": {**TEXT_ENCODER, "tokens": tokens, "width": width},
        "null": describe_null(data, "text").model_dump(),
        "compute": COMPUTE,
    }
    values = blank.model_dump()
    values["streams"]["text"] = text
    manifest = Manifest.model_validate(values)
    streams = {**manifest.streams, name: stream.model_copy(update={"teacher": teacher})}
    manifest = manifest.model_copy(update={"streams": streams, "autoencoder": autoencoder})
    store = Store(str(folder), manifest)
    write_null(store, "text", data)
    return store


def batch_of(recipes: Golden, step: int) -> Batch:
    """Moments and captions of a step; the teacher's targets, the same at every step."""
    io = recipes.tensors("t2i_train_io")
    mean, log_variance = io["moments"][step].chunk(2, dim=1)
    std = torch.exp(log_variance.clamp(-30, 20) / 2)
    index, contexts = io["context_index"][step], io["contexts"]
    dropped = index == len(contexts) - 1
    captions = torch.where(dropped.view(-1, 1, 1), torch.nan, contexts[index])
    features = io["teacher_features"]
    logits = io["teacher_attn_q"] @ io["teacher_attn_k"].mT
    columns = {
        "latents": {"mean": mean, "std": std, "label": torch.zeros(len(mean), dtype=torch.int64)},
        "text": {CAPTION: captions, DROPPED: dropped},
        "maps": {
            "features": features,
            "class_token": features[:, 0],
            "attention": torch.softmax(logits, dim=-1),
        },
    }
    return Batch(
        step=step,
        positions=np.arange(len(mean)),
        columns={s: {n: t.numpy() for n, t in c.items()} for s, c in columns.items()},
    )
