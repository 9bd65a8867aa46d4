"""The attention loss without maps against the formula as it stands."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pipeline.alignment.fused_attention_loss import fused_attention_loss
from pipeline.alignment.losses import attention_loss
from pipeline.models.taps import QueriesKeys
from tests.helpers import needs_compiler

B, L, H, N, D = 3, 2, 4, 16, 8


def operands(seed: int = 0, dtype: torch.dtype = torch.float32, sharpness: float = 1.0) -> Tensor:
    """Queries and keys of each layer as they come: views into one tensor, heads beside tokens."""
    rng = torch.Generator().manual_seed(seed)
    qkv = torch.randn(L, B, N, 3, H, D, generator=rng) * sharpness
    return qkv.to(dtype).requires_grad_()


def attended(qkv: Tensor, heads: int = H) -> list[QueriesKeys]:
    pairs = []
    for layer in qkv:
        q, k, _ = layer.permute(2, 0, 3, 1, 4).unbind(0)
        pairs.append(QueriesKeys(q[:, :heads], k[:, :heads]))
    return pairs


def teacher(sharpness: float = 1.0, heads: int = H) -> Tensor:
    rng = torch.Generator().manual_seed(9)
    return torch.softmax(torch.randn(B, L, heads, N, N, generator=rng) * sharpness, -1)


def plain(qkv: Tensor, probs: Tensor, heads: int = H) -> Tensor:
    logits = torch.stack([one.logits for one in attended(qkv, heads)], dim=1)
    return attention_loss(logits, probs)


def gradient(losses: Tensor, qkv: Tensor) -> Tensor:
    """Of a sum in which samples count differently."""
    weights = torch.arange(1.0, B + 1)
    (grad,) = torch.autograd.grad((losses * weights).sum(), qkv)
    return grad


@pytest.mark.parametrize("sharpness", [0.1, 1.0, 8.0])  # the last: logits of some hundreds
@pytest.mark.parametrize(
    "compiled", [False, pytest.param(True, marks=[needs_compiler, pytest.mark.long])]
)
def test_it_is_the_plain_loss(sharpness: float, compiled: bool) -> None:
    qkv = operands(sharpness=sharpness)
    probs = teacher(sharpness)
    got = fused_attention_loss(attended(qkv), probs, compiled=compiled)
    expected = plain(qkv, probs)
    assert got.shape == (B,)
    torch.testing.assert_close(got, expected, rtol=2e-6, atol=1e-6)
    one, other = gradient(got, qkv), gradient(expected, qkv)
    torch.testing.assert_close(one, other, rtol=1e-5, atol=2e-6 * float(other.abs().max()))
    assert other.abs().max() > 0


def test_its_gradient_is_that_of_differences() -> None:
    probs = teacher().double()

    def loss(q: Tensor, k: Tensor) -> Tensor:
        return fused_attention_loss([QueriesKeys(q, k)], probs[:1, :1, :2])

    rng = torch.Generator().manual_seed(3)
    q, k = (torch.randn(1, 2, N, D, generator=rng).double().requires_grad_() for _ in range(2))
    # losses come in float32, hence the wide steps
    assert torch.autograd.gradcheck(loss, (q, k), eps=1e-2, atol=1e-3, rtol=1e-2)


def test_one_hot_and_uniform_rows() -> None:
    qkv = operands(sharpness=3.0)
    for probs in (torch.eye(N).expand(B, L, H, N, N), torch.full((B, L, H, N, N), 1 / N)):
        got, expected = fused_attention_loss(attended(qkv), probs), plain(qkv, probs)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
        one, other = gradient(got, qkv), gradient(expected, qkv)
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_in_bfloat16_it_errs_no_more_than_the_plain_loss() -> None:
    exact = operands()
    half = exact.detach().bfloat16().requires_grad_()
    probs = teacher()
    truth = gradient(plain(exact, probs), exact)
    errors = [
        float((gradient(losses, half).float() - truth).norm() / truth.norm())
        for losses in (fused_attention_loss(attended(half), probs), plain(half, probs))
    ]
    assert errors[0] < 1.5 * errors[1] < 0.05


def test_nothing_of_a_maps_size_is_kept_for_the_backward_pass() -> None:
    qkv = operands()
    probs = teacher()
    kept: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() != probs.untyped_storage().data_ptr():
            kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        fused_attention_loss(attended(qkv), probs)
    assert kept
    assert max(kept) < B * H * N * N


def test_under_autocast_both_passes_see_the_same_logits() -> None:
    """Of operands that autocast left in float32, as a norm of queries and keys would."""
    qkv, probs = operands(), teacher()
    with torch.autocast("cpu", torch.bfloat16):
        got = fused_attention_loss(attended(qkv), probs)
    expected = plain(qkv, probs)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(gradient(got, qkv), gradient(expected, qkv))


def test_no_samples() -> None:
    q = torch.zeros(0, H, N, D, requires_grad=True)
    losses = fused_attention_loss([QueriesKeys(q, q)], torch.zeros(0, 1, H, N, N))
    losses.sum().backward()
    assert losses.shape == (0,)
    assert q.grad is not None
