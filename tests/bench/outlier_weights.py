"""Weights with the outliers that make real teachers hard to quantise: massive channels and loud
tokens.

Trained vision transformers have a few channels that are large in every token, and a few tokens of
many times the usual norm (arXiv 2309.16588, 2402.17762). Both are planted in the MLP of one block,
so that all later blocks receive them through the project's own code; later norms get small weights
at the massive channels, as trained ones have.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.teachers import Teacher

OFFSETS = (10.0, -16.0, 25.0, -40.0, 63.0, 100.0)
"""Offsets of the massive channels, in standard deviations of an ordinary channel."""
JITTER = 0.15
"""Standard deviation of massive channels over tokens, relative to the offset."""
LOUD_UNITS = 6
LOUD_SHARE = 0.004
"""Share of the tokens that each unit makes loud."""
MAX_NORM = 100.0
"""Norm of the loudest token, in norms of an ordinary one."""
REGISTER_NORM = 30.0
"""Norm of registers, in norms of an ordinary token, where they are the loud ones."""
MASSIVE_WEIGHT = 0.05
"""Weights of a norm at massive channels, relative to its other weights."""


@torch.no_grad()
def plant_outliers(
    teacher: Teacher,
    images_B3RR: Tensor,
    *,
    block: int,
    sharpness: float,
    seed: int,
    registers: bool = False,
) -> Any:
    """Change the weights of ``block`` and of later blocks in place, calibrated on the tokens of a
    few images. ``sharpness`` scales later queries and keys, because loud tokens sharpen
    attention. With ``registers`` these are the loud tokens, and no patches are."""
    rng = torch.Generator().manual_seed(seed)
    vit = teacher.vit
    target = vit.blocks[block]
    tokens = teacher.embed(teacher.preprocess(images_B3RR))
    with _inputs_of(target.mlp.fc1) as inputs:
        tokens, _ = teacher.run_blocks(tokens, 0, block + 1)
    hidden_in = inputs[0].flatten(0, 1)
    hidden = target.mlp.act(target.mlp.fc1(hidden_in))
    fc2 = target.mlp.fc2
    gamma = target.ls2.gamma if hasattr(target, "ls2") else target.gamma_2

    channels = torch.randperm(tokens.shape[-1], generator=rng)[: len(OFFSETS)]
    offsets = tokens.std() * torch.tensor(OFFSETS)
    gamma[channels] = 1.0
    varied = hidden @ fc2.weight[channels].T
    fc2.weight[channels] *= (JITTER * offsets.abs() / varied.std(0)).unsqueeze(1)
    fc2.bias[channels] = offsets - (hidden @ fc2.weight[channels].T).mean(0)

    norm = (tokens.square().sum(-1).median() + offsets.square().sum()).sqrt()
    if registers:
        loud = _directions(teacher.vit.reg_token.shape[1], tokens.shape[-1], channels, rng)
        teacher.vit.reg_token.copy_(loud * norm * REGISTER_NORM)
    else:
        _plant_loud_tokens(target.mlp, gamma, hidden_in, norm, channels, rng)
    for later in vit.blocks[block + 1 :]:
        later.attn.qkv.weight[: 2 * tokens.shape[-1]] *= sharpness
        if later.attn.qkv.bias is not None:
            later.attn.qkv.bias[: 2 * tokens.shape[-1]] *= sharpness
    _rescale_norms(teacher, images_B3RR, block + 1, channels)


def _directions(count: int, width: int, channels: Tensor, rng: torch.Generator) -> Tensor:
    """Unit vectors (count, width), mostly in massive channels."""
    directions = torch.randn(count, width, generator=rng)
    directions[:, channels] *= 10
    return directions / directions.norm(dim=-1, keepdim=True)


def _plant_loud_tokens(
    mlp: Any,
    gamma: Tensor,
    hidden_in: Tensor,
    norm: Tensor,
    channels: Tensor,
    rng: torch.Generator,
) -> None:
    fc1, fc2 = mlp.fc1, mlp.fc2
    units = torch.randperm(fc1.out_features, generator=rng)[:LOUD_UNITS]
    before = hidden_in @ fc1.weight[units].T
    threshold = torch.quantile(before, 1 - LOUD_SHARE, dim=0)
    # Steep enough that GELU's output below zero is small relative to the loudest.
    steepness = MAX_NORM / (before.amax(0) - threshold)
    fc1.weight[units] *= steepness.unsqueeze(1)
    fc1.bias[units] = -threshold * steepness
    directions = _directions(LOUD_UNITS, fc2.out_features, channels, rng)
    fc2.weight[:, units] = (directions * norm).T / gamma.unsqueeze(1)


def describe(teacher: Teacher, images_B3RR: Tensor, block: int) -> dict[str, float]:
    """Statistics of the tokens that enter ``block``, and of the attention of later layers."""
    with torch.no_grad():
        entering, _ = teacher.run_blocks(teacher.embed(teacher.preprocess(images_B3RR)), stop=block)
        _, attended = teacher.run_blocks(entering, block)
    norms = entering[:, teacher.prefix :].norm(dim=-1)
    flat = entering.flatten(0, 1)
    middle = flat.median(0).values
    spread = (flat - middle).abs().median(0).values
    logits = torch.stack([attended[layer] for layer in teacher.layers[-4:]])
    probs = torch.softmax(logits, -1)
    return {
        "loud tokens per image (norm > 4 x median)": round(
            float((norms > 4 * norms.median()).sum() / len(norms)), 1
        ),
        "loudest / median norm": round(float(norms.max() / norms.median()), 1),
        "massive channels (median > 8 x spread of the others)": int(
            (middle.abs() > 8 * spread.median()).sum()
        ),
        "logit std": round(float(logits.std(-1).mean()), 2),
        "attention entropy, nats": round(float(torch.special.entr(probs).sum(-1).mean()), 2),
        "largest of a row, mean": round(float(probs.amax(-1).mean()), 3),
        "log of tokens": round(math.log(logits.shape[-1]), 2),
    }


def _rescale_norms(teacher: Teacher, images_B3RR: Tensor, first: int, channels: Tensor) -> None:
    """Rescale the weights of every norm from block ``first`` on during one forward pass, so that
    ordinary channels have the spread that they would have without massive ones."""
    ordinary = torch.ones(teacher.vit.embed_dim, dtype=torch.bool)
    ordinary[channels] = False

    def adapt(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        (x,) = inputs
        ratio = (x.std(-1) / x[..., ordinary].std(-1)).median()
        norm.weight[ordinary] *= ratio
        norm.weight[~ordinary] *= ratio * MASSIVE_WEIGHT

    norms = [norm for block in teacher.vit.blocks[first:] for norm in (block.norm1, block.norm2)]
    hooks = [norm.register_forward_pre_hook(adapt) for norm in [*norms, teacher.vit.norm]]
    try:
        teacher(images_B3RR)
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _inputs_of(module: nn.Module) -> Iterator[list[Tensor]]:
    """Yield a list that collects the inputs of a module."""
    collected: list[Tensor] = []
    hook = module.register_forward_pre_hook(lambda _, inputs: collected.append(inputs[0]))
    try:
        yield collected
    finally:
        hook.remove()
