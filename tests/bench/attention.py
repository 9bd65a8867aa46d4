"""The attention loss of the tapped layers, forward and backward: fused against plain."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
from torch import Tensor

from pipeline.alignment.fused_attention_loss import fused_attention_loss
from pipeline.alignment.losses import attention_loss
from pipeline.models.taps import QueriesKeys
from tests.bench.options import AttentionOptions as Options
from tests.bench.report import Heading, Report, Row, Table
from tests.bench.timing import Clock

HEADINGS = (
    Heading("way", "way"),
    Heading("ms", "ms per image", ".3f"),
    Heading("ratio", "/ plain", ".3f"),
    Heading("kept_mib", "MiB kept per image", ".1f"),
    Heading("gradient_error", "gradient error", ".1e"),
)
MEBI = 1 << 20


def run(options: Options) -> Report:
    torch.set_num_threads(options.threads)
    clock = Clock.of(options.device)
    on_gpu = clock.device.type == "cuda"
    batch = options.batch or (32 if on_gpu else 4)
    rng = torch.Generator().manual_seed(0)
    shape = (options.layers, batch, options.tokens, 3, options.heads, options.head_width)
    exact = torch.randn(shape, generator=rng).to(clock.device)
    qkv = exact.bfloat16() if on_gpu else exact.clone()
    qkv.requires_grad_()
    maps = (batch, options.layers, options.heads, options.tokens, options.tokens)
    probs = torch.softmax(torch.randn(maps, generator=rng), -1).to(clock.device)
    variants: dict[str, Callable[[Tensor], Tensor]] = {
        "plain": lambda x: plain(x, probs),
        "fused": lambda x: fused_attention_loss(queries_keys(x), probs),
    }
    if options.compiled:
        variants["fused, compiled"] = lambda x: fused_attention_loss(
            queries_keys(x), probs, compiled=True
        )
    truth = gradient(variants["plain"], exact.requires_grad_())
    times: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(options.rounds + 2):
        for name, loss in variants.items():
            seconds = clock.time(lambda f=loss: gradient(f, qkv))
            if number > 1:  # the first rounds warm up
                times[name].append(seconds / batch)
    rows: list[Row] = [
        {
            "way": name,
            "ms": statistics.median(times[name]) * 1e3,
            "ratio": statistics.median(
                a / b for a, b in zip(times[name], times["plain"], strict=True)
            ),
            "kept_mib": saved_bytes(loss, qkv, probs) / batch / MEBI,
            "gradient_error": float((gradient(loss, qkv).float() - truth).norm() / truth.norm()),
        }
        for name, loss in variants.items()
    ]
    about = {"device": clock.name, "clock": clock.about, "batch": batch}
    headline = {"fused_over_plain": rows[-1]["ratio"]}
    title = f"{options.layers} layers, {options.heads} heads, {options.tokens} tokens"
    return Report(about, [Table(title, HEADINGS, rows)], headline)


def queries_keys(qkv: Tensor) -> list[QueriesKeys]:
    """Queries and keys of each layer, with the memory layout of the student's layers."""
    pairs = []
    for layer in qkv:
        q, k, _ = layer.permute(2, 0, 3, 1, 4).unbind(0)
        pairs.append(QueriesKeys(q, k))
    return pairs


def plain(qkv: Tensor, probs: Tensor) -> Tensor:
    return attention_loss(torch.stack([one.logits for one in queries_keys(qkv)], dim=1), probs)


def gradient(loss: Callable[[Tensor], Tensor], qkv: Tensor) -> Tensor:
    (grad,) = torch.autograd.grad(loss(qkv).sum(), qkv)
    return grad


def saved_bytes(loss: Callable[[Tensor], Tensor], qkv: Tensor, probs: Tensor) -> int:
    """Bytes saved for the backward pass, without operands and targets."""
    inputs = {tensor.untyped_storage().data_ptr() for tensor in (qkv, probs)}
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in inputs:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss(qkv)
    return sum(found.values())
