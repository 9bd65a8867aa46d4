"""Tensors to stored numbers and back, hostile ones among them."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from pipeline.store.arrays import stream_parts
from pipeline.store.codecs import decode_column, encode_column, find_codec, part_name, sums_to_one
from schemas.streams import Column

TOKENS = ("float32", "float16", "bfloat16", "int8", "int8_group64", "int8_outliers16")
TOKENS += ("int8_centred", "tokens20", "tokens8", "rms26", "rms8")
T, D = 33, 128


def round_trip(codec: str, values: torch.Tensor) -> torch.Tensor:
    """Through the very arrays that a store keeps, dtypes and shapes checked."""
    column = Column(shape=tuple(values.shape[1:]), codec=codec)
    stored = encode_column("x", column, values)
    parts = stream_parts({"x": column})
    assert stored.keys() == parts.keys()
    arrays = {name: tensor.numpy() for name, tensor in stored.items()}
    for name, part in parts.items():
        assert arrays[name].dtype == part.dtype, name
        assert arrays[name].shape == (len(values), *part.shape), name
        assert np.isfinite(arrays[name]).all()
    back = decode_column("x", column, {n: torch.from_numpy(a) for n, a in arrays.items()})
    assert back.shape == values.shape
    assert torch.isfinite(back).all()
    return back


def error(codec: str, values: torch.Tensor) -> torch.Tensor:
    """Error of each token relative to its own norm: (B, ..., T)."""
    apart = (round_trip(codec, values).double() - values.double()).norm(dim=-1)
    return apart / values.double().norm(dim=-1).clamp_min(1e-30)


def tokens(seed: int = 0) -> torch.Tensor:
    """As in a vision transformer: a shared part, a few massive channels, a few loud tokens."""
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(3, T, D, generator=random) + torch.randn(D, generator=random)
    x[:, :, 5] += 40
    x[:, :, 17] -= 90
    x[:, 3] *= 30
    return x


BOUNDS = {
    "float32": 0,
    "float16": 1e-3,
    "bfloat16": 5e-3,
    "int8": 0.03,
    "int8_group64": 0.03,
    "int8_outliers16": 0.03,
    "int8_centred": 0.03,
    "tokens20": 0.03,
    "tokens8": 0.06,
    "rms26": 0.03,
    "rms8": 0.06,
}


@pytest.mark.parametrize("codec", TOKENS)
def test_ordinary_tokens_come_back(codec: str) -> None:
    assert error(codec, torch.randn(3, T, D)).max() <= BOUNDS[codec]
    assert error(codec, tokens()).max() <= BOUNDS[codec]


def hostile() -> dict[str, torch.Tensor]:
    plain = torch.randn(2, T, D, generator=torch.Generator().manual_seed(1))

    def changed(**where: Any) -> torch.Tensor:
        x = plain.clone()
        for axis, factor in where.items():
            if axis == "token":
                x[:, 4] *= factor
            elif axis == "channel":
                x[:, :, 7] *= factor
            else:
                x[:, :, 7] += factor
        return x

    one_hot = torch.zeros(2, T, D)
    one_hot[:, torch.arange(T), torch.arange(T)] = 1
    return {
        "a token of 1000 times the norm": changed(token=1000.0),
        "a token of a millionth": changed(token=1e-6),
        "a silent token": changed(token=0.0),
        "a channel of 1000 times": changed(channel=1000.0),
        "a channel far off": changed(offset=1e4),
        "one-hot tokens": one_hot,
        "duplicates": plain[:, :1].expand(2, T, D).contiguous(),
        "constant": torch.full((2, T, D), 3.25),
        "zeros": torch.zeros(2, T, D),
        "tiny": plain * 1e-6,
        "large": plain * 1e4,
    }


@pytest.mark.parametrize("codec", ["int8", "tokens20", "rms26", "bfloat16"])
@pytest.mark.parametrize("name", list(hostile()))
def test_hostile_tokens_come_back_as_well_as_others(codec: str, name: str) -> None:
    bound = BOUNDS[codec] if "channel" not in name else 2 * BOUNDS[codec]
    assert error(codec, hostile()[name]).max() <= bound


def test_zeros_come_back_as_zeros() -> None:
    x = torch.randn(1, T, D)
    x[:, 2] = 0
    for codec in ("tokens20", "rms8", "int8"):
        assert round_trip(codec, x)[:, 2].abs().max() == 0
        assert round_trip(codec, x * 0).abs().max() == 0
    assert round_trip("heads24", torch.zeros(1, 2, 3, 4, 8)).abs().max() == 0


@pytest.mark.parametrize("levels", [8, 12, 26, 60])
def test_cosine_of_rms_codec_is_as_promised(levels: int) -> None:
    x = tokens(2)
    cosine = torch.cosine_similarity(x, round_trip(f"rms{levels}", x), dim=-1)
    expected = 1 - 1 / (24 * levels**2)
    assert cosine.mean().item() == pytest.approx(expected, abs=0.3 * (1 - expected))


def test_levels_of_tokens_are_the_spread_of_codes_whatever_the_scale() -> None:
    for scale, offset in ((1.0, 0.0), (1e-3, 0.0), (50.0, 0.0), (1.0, 7.0)):
        x = torch.randn(2, 257, D) * scale + offset * scale
        planes = find_codec("tokens20").encode(x)[""].int()
        codes = planes[:, 0] + 256 * planes[:, 1].to(torch.int8).int() - 128
        assert codes.float().std().item() == pytest.approx(20, rel=0.05)


def test_finer_is_better_and_more() -> None:
    from numcodecs import Zstd

    x = tokens()
    sizes, errors = [], []
    for levels in (4, 8, 16, 32, 64):
        sizes.append(len(Zstd(level=1).encode(find_codec(f"tokens{levels}").encode(x)[""].numpy())))
        errors.append(float(error(f"tokens{levels}", x).mean()))
    assert sizes == sorted(sizes)
    assert errors == sorted(errors, reverse=True)
    for a, b in itertools.pairwise(errors):
        assert a / b == pytest.approx(2, rel=0.15)


@pytest.mark.parametrize("codec", ["int8", "heads24", "heads10", "float16", "bfloat16"])
def test_queries_and_keys_come_back(codec: str) -> None:
    q = torch.randn(2, 3, 4, 16, 8)
    q[:, 1, 2] *= 100
    q[:, 0, 0] = 0
    back = round_trip(codec, q)
    worst = (back - q).abs().amax((-1, -2)) / q.square().mean((-1, -2)).sqrt().clamp_min(1e-9)
    assert worst.max() < {"heads10": 0.06, "heads24": 0.03}.get(codec, 0.03)


def rows(kind: str) -> torch.Tensor:
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 4, 64, 64, generator=random)
    if kind == "one-hot":
        return torch.nn.functional.one_hot(torch.arange(64), 64).float().expand(2, 3, 4, 64, 64)
    if kind == "uniform":
        return torch.full((2, 3, 4, 64, 64), 1 / 64)
    if kind == "logits of 80":
        return torch.softmax(80 * logits.sign(), -1)
    return torch.softmax(logits * {"flat": 0.5, "usual": 2, "sharp": 12}[kind], -1)


def divergence(exact: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    exact, other = exact.double(), other.double()
    return torch.special.xlogy(exact, exact / other.clamp_min(1e-300)).sum(-1)


@pytest.mark.parametrize(
    ("codec", "mean", "worst"),
    [
        ("float16", 1e-6, 1e-5),
        ("bfloat16", 1e-4, 1e-3),
        ("cbrt8", 1e-4, 3e-4),
        ("sqrt510", 2e-4, 1e-3),
        ("sqrt220", 1e-3, 5e-3),
    ],
)
@pytest.mark.parametrize("kind", ["one-hot", "uniform", "logits of 80", "flat", "usual", "sharp"])
def test_attention_rows_come_back(codec: str, mean: float, worst: float, kind: str) -> None:
    exact = rows(kind)
    back = round_trip(codec, exact).float()
    if codec in {"float16", "bfloat16"}:
        back = back / back.sum(-1, keepdim=True)
    torch.testing.assert_close(back.sum(-1), torch.ones(back.shape[:-1]), rtol=0, atol=1e-5)
    found = divergence(exact, back)
    if codec != "float16" or kind not in {"sharp", "logits of 80"}:
        assert found.mean() < mean
        assert found.max() < worst


@pytest.mark.parametrize(
    ("codec", "shape", "reason"),
    [
        ("tokens20", (4,), "tokens x channels"),
        ("tokens20", (0, 4), "tokens x channels"),
        ("heads24", (4, 8), "layers x heads"),
        ("int8", (), "vectors"),
        ("int8_centred", (8,), "several tokens"),
        ("int8_group64", (4, 100), "multiple"),
        ("int8_outliers16", (4, 16), "too few"),
        ("cbrt8", (), "rows of probabilities"),
    ],
)
def test_shapes_that_a_codec_is_not_for(codec: str, shape: tuple[int, ...], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        find_codec(codec).arrays(shape)


@pytest.mark.parametrize("name", ["int4", "tokens0", "tokens", "rms-3", "tokens1000", "pickle", ""])
def test_unknown_codecs_are_refused(name: str) -> None:
    with pytest.raises(ValidationError, match="codec"):
        Column(shape=(2, 4), codec=name)


def test_another_shape_than_the_columns_is_refused() -> None:
    with pytest.raises(ValueError, match=r"x: expected shape \(4,\), got \(5,\)"):
        encode_column("x", Column(shape=(4,), codec="float32"), torch.zeros(2, 5))


def test_the_main_array_has_the_columns_name() -> None:
    assert part_name("tokens", "") == "tokens"
    assert part_name("tokens", "step") == "tokens.step"


@pytest.mark.parametrize("codec", ["float32", "cbrt8", "sqrt512", "sqrt160", "float16", "bfloat16"])
def test_which_rows_of_probabilities_sum_to_one(codec: str) -> None:
    random = torch.Generator().manual_seed(5)
    probs = torch.softmax(4 * torch.randn(2, 3, 50, 50, generator=random), dim=-1)
    sums = round_trip(codec, probs).float().sum(-1)
    assert sums_to_one(codec) == bool((sums - 1).abs().max() < 1e-6)
