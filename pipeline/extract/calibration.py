"""Choice of codec steps before an extraction: the coarsest that keep a promise on a few images.

Errors of targets grow with the square of the step, by a factor that depends on the teacher. So the
step is searched for on images of the data set, for each column and each layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.alignment.losses import Targets
from pipeline.inspect.fidelity import Fidelity, RandomStudent, kl_of_rows, student_like
from pipeline.store.codecs import codec_family, decode_column, sums_to_one
from pipeline.targets.cuts import (
    CODEC_SETS,
    KIND_OF,
    encode_unchecked,
    later_cut_values,
    not_finite,
    stepped_columns,
    with_steps,
)
from pipeline.teachers import Teacher
from pipeline.teachers.attention_tap import qk_logits
from schemas.calibration import Calibration, CalibrationCurve, CalibrationPoint, TargetErrors
from schemas.codecs import CalibratedSet, CodecName, Promise
from schemas.errors import UserError
from schemas.extract import Cut, Precision
from schemas.streams import Column

MARGIN = 0.05
"""Share of the promise that stays free: other images differ from the measured ones."""
STANDARD_ERRORS = 2.0
"""Standard errors of a mean over images that are added to it before it is compared."""
GUESSES = 4
"""Steps tried by the law of squares, before the rest of the range is halved."""
FINEST = 999
FINEST_ROOT = 4080
"""Levels at which no row of 256 probabilities or fewer gets finer steps, which are of 8 bits."""
FIRST_ROOT = 500
CHUNK_BYTES = 1 << 26
"""Attention of the images that are compared at the same time, in float32."""
MAX_CHUNK = 32
GRADIENT_IMAGES = 64
"""Images whose gradients are compared, as one sum: more do not move its direction."""


@dataclass(frozen=True)
class Subject:
    """A teacher and its tokens (M, P + N, D), on the CPU, that enter the first stored layer."""

    cut: Cut
    teacher: Teacher
    columns: Mapping[str, Column]
    """Columns with the fixed steps of the codec set."""
    keys: tuple[str, ...]
    """Keys of the M images."""
    tokens: Tensor
    exact_tokens: Tensor | None
    """The same in float32 arithmetic; None where ``tokens`` are."""
    precision: Precision
    device: torch.device
    progress: Callable[[int], None] = lambda images: None
    """Called after each batch of each pass with its number of images."""

    @property
    def first(self) -> int:
        """Block that the tokens enter."""
        return first_block(self.teacher)

    def values(self, tokens: Tensor, cut: Cut, precision: Precision) -> dict[str, Tensor]:
        dtype = getattr(torch, precision)
        with torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32):
            return later_cut_values(cut, self.teacher, tokens, self.first)

    def targets(self, values: Mapping[str, Tensor], columns: Mapping[str, Column]) -> Targets:
        """Targets of a cut's tensors, in the precision of the extraction."""
        if self.cut == "activations":
            values = self.values(values["tokens"], "maps", self.precision)
        attention = values.get("attention")
        if "query" in values:
            attention = torch.softmax(qk_logits(values["query"], values["key"]), dim=-1)
        elif "attention" in columns and not sums_to_one(columns["attention"].codec):
            attention = values["attention"] / values["attention"].sum(-1, keepdim=True)
        return Targets(values["features"], attention)


def first_block(teacher: Teacher) -> int:
    """The first block whose attention is stored; without layers the end of the teacher."""
    return teacher.layers[0] if teacher.layers else teacher.depth


@dataclass
class Search:
    """The search for the step of one column, or of one layer of one or two columns."""

    columns: tuple[str, ...]
    family: str
    start: int
    row: int | None = None
    """Index of the layer in the column."""
    points: dict[int, CalibrationPoint] = field(default_factory=dict)
    """By levels, in the order of measurement."""
    chosen: int = 0

    @property
    def finest(self) -> int:
        """One more than ``FINEST_ROOT`` stands for cbrt8, the most accurate codec of 8 bits."""
        return FINEST_ROOT + 1 if self.family == "sqrt" else FINEST

    def codec(self, levels: int) -> CodecName:
        return f"{self.family}{levels}" if levels <= FINEST_ROOT else "cbrt8"

    @property
    def needs_cbrt8(self) -> bool:
        """True once a layer of the column was tried with cbrt8: all layers have it then."""
        return self.family == "sqrt" and self.finest in self.points

    def next_levels(self) -> int | None:
        if self.needs_cbrt8:
            return None
        shares = {levels: point.share for levels, point in self.points.items()}
        return next_levels(shares, self.start, self.finest)


def keeps(share: float) -> bool:
    return share <= 1 - MARGIN


def next_levels(shares: dict[int, float], start: int, finest: int) -> int | None:
    """Levels to measure next, from the shares of the promise that others used, in the order of
    measurement. None when the coarsest that keeps it is known, or the finest does not."""
    good = min((levels for levels, share in shares.items() if keeps(share)), default=finest + 1)
    bad = max((n for n, share in shares.items() if n < good and not keeps(share)), default=0)
    if good - bad <= 1:
        return None
    if not shares:
        return min(start, finest)
    last, share = next(reversed(shares.items()))
    if len(shares) < GUESSES and math.isfinite(share):
        guess = math.ceil(last * math.sqrt(share / (1 - MARGIN)))
    else:
        guess = math.isqrt(max(1, bad) * good)
    return min(max(guess, bad + 1), good - 1)


class Measured(NamedTuple):
    """Errors of M images."""

    kl: Tensor
    """(M, L) mean over the rows of a layer; L may be 0."""
    cosine: Tensor
    """(M,) 1 - cosine, mean over tokens."""
    gradient: float | None
    """1 - cosine of all images' gradients; None where it was not measured."""


@torch.no_grad()
def calibrate(
    subject: Subject,
    codec: CalibratedSet,
    promise: Promise,
    latent_shape: tuple[int, int, int],
    *,
    fixed: frozenset[str],
    images: int,
    seed: int,
) -> Calibration:
    """The coarsest steps that keep ``promise`` with ``MARGIN``; columns ``fixed`` keep theirs.

    Raises ``UserError`` where a tensor is not finite, or the same for every token, or where no
    step keeps the promise.
    """
    check_tensors(subject, fixed)
    searches = make_searches(subject, codec, fixed)
    student = RandomStudent(
        student_like(latent_shape, subject.teacher.info()),
        subject.teacher.info(),
        subject.teacher.heads,
    ).to(subject.device)
    while pending := {id(s): n for s in searches if (n := s.next_levels()) is not None}:
        for search in searches:
            search.chosen = pending.get(id(search), _best(search))
        _share_cbrt8(searches)
        _measure(subject, searches, promise)
    for search in searches:
        search.chosen = _best(search)
        if not keeps(search.points[search.chosen].share):
            raise _unkept(subject, search, codec, promise)
    found = _measure(subject, searches, promise, student)
    while not keeps(share := _gradient(found) / (1 - promise.gradient_cosine)):
        if all(search.chosen == search.finest for search in searches):
            raise UserError(
                f"--codec {codec}: no step keeps a gradient cosine of {promise.gradient_cosine:g} "
                f"over {len(subject.keys)} images: {1 - _gradient(found):.6f} at most; ask for "
                "less with --codec.gradient-cosine, or use --codec float16"
            )
        for search in searches:
            finer = math.ceil(search.chosen * min(2.0, math.sqrt(share / (1 - MARGIN))))
            search.chosen = min(max(finer, search.chosen + 1), search.finest)
        _share_cbrt8(searches)
        found = _measure(subject, searches, promise, student)
    return Calibration(
        codec=codec,
        promise=promise,
        margin=MARGIN,
        seed=seed,
        images=images,
        keys=subject.keys,
        curves=tuple(_curves(searches, subject.teacher.layers)),
        errors=_errors(found),
        arithmetic=None
        if subject.exact_tokens is None
        else _errors(_compare(subject, _arithmetic(subject), student)),
    )


def make_searches(subject: Subject, codec: CalibratedSet, fixed: frozenset[str]) -> list[Search]:
    """A search for each column that may get another step, and for each layer of maps or factors;
    query and key share theirs."""
    names = stepped_columns(subject.columns, fixed)
    searches = []
    for group in (("tokens",), ("features",), ("attention",), ("query", "key")):
        columns = tuple(name for name in group if name in names)
        if not columns:
            continue
        usual = CODEC_SETS[codec][KIND_OF[columns[0]]]
        family, start = codec_family(usual), FIRST_ROOT
        if family is not None:
            start = int(usual.removeprefix(family))
        elif columns == ("attention",):
            family = "sqrt"
        else:  # a codec without levels
            continue
        layered = columns[0] not in {"tokens", "features"}
        rows = range(len(subject.teacher.layers)) if layered else (None,)
        searches += [Search(columns, family, start, row) for row in rows]
    return searches


def check_tensors(subject: Subject, fixed: frozenset[str]) -> None:
    """Raises ``UserError`` naming the image with NaN or an infinity, or a column that is the same
    for every token of every image: its errors would say nothing."""
    first: dict[str, Tensor] = {}
    constant = dict.fromkeys(["features", *stepped_columns(subject.columns, fixed)], True)
    for rows, tokens in _chunks(subject, subject.tokens):
        values = subject.values(tokens, subject.cut, subject.precision)
        targets = subject.targets(values, subject.columns)
        found = {"features": targets.features, "attention": targets.attention}
        tensors = values | {name: one for name, one in found.items() if one is not None}
        flags = not_finite(tensors, tensors)
        for name, bad in flags.items():
            if bad.any():
                key = subject.keys[rows.start + int(bad.nonzero()[0])]
                raise UserError(
                    f"image '{key}': the teacher's {name} holds NaN or an infinity, and no step "
                    "of a codec can store it; try --precision float32, or check its weights"
                )
        for name in constant:
            one = first.setdefault(name, tensors[name][:1, ..., :1, :].clone())
            constant[name] &= torch.equal(tensors[name], one.expand_as(tensors[name]))
    for name, is_constant in constant.items():
        if is_constant:
            raise UserError(
                f"the teacher's {name} is the same for every token of {len(subject.keys)} images: "
                "no step can be measured on it; check the teacher's weights, or take fixed steps "
                "with --codec.calibration 0"
            )


def _chunks(subject: Subject, tokens: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Rows and their tokens on the device."""
    teacher = subject.teacher
    maps = max(1, len(teacher.layers) * teacher.heads) * math.prod(teacher.grid) ** 2 * 4
    size = min(MAX_CHUNK, max(1, CHUNK_BYTES // maps))
    for start in range(0, len(tokens), size):
        rows = slice(start, min(start + size, len(tokens)))
        yield rows, tokens[rows].to(subject.device)
        subject.progress(rows.stop - rows.start)


def _coded(subject: Subject, columns: Mapping[str, Column]) -> Iterator[tuple[Targets, Targets]]:
    """Targets of each chunk without and with the codecs of ``columns``."""
    for _, tokens in _chunks(subject, subject.tokens):
        values = subject.values(tokens, subject.cut, subject.precision)
        stored = encode_unchecked(columns, values)
        decoded = {
            name: decode_column(name, column, stored).float() for name, column in columns.items()
        }
        yield subject.targets(values, columns), subject.targets(decoded, columns)


def _arithmetic(subject: Subject) -> Iterator[tuple[Targets, Targets]]:
    """Targets of each chunk in float32, and in the precision of the extraction."""
    assert subject.exact_tokens is not None
    both = zip(
        _chunks(subject, subject.exact_tokens), _chunks(subject, subject.tokens), strict=True
    )
    for (_, exact), (_, tokens) in both:
        values = subject.values(exact, "maps", "float32")
        own = subject.values(tokens, "maps", subject.precision)
        yield (
            Targets(values["features"], values.get("attention")),
            Targets(own["features"], own.get("attention")),
        )


def _compare(
    subject: Subject,
    pairs: Iterator[tuple[Targets, Targets]],
    student: RandomStudent | None = None,
) -> Measured:
    kl, cosines = [], []
    gradients = Fidelity(subject.cut, subject.teacher.layers)
    if student is not None:
        student.restart()
    for reference, coded in pairs:
        assert reference.features is not None
        assert coded.features is not None
        one, other = reference.features.double(), coded.features.double()
        cosine = torch.cosine_similarity(one, other, dim=-1)
        cosines.append(1 - cosine.mean(-1).cpu())
        if reference.attention is not None and coded.attention is not None:
            layers = zip(reference.attention.unbind(1), coded.attention.unbind(1), strict=True)
            means = [kl_of_rows(p, q).mean((-2, -1)).cpu() for p, q in layers]  # bounds memory
            kl.append(torch.stack(means, 1))
        if student is not None and gradients.images < GRADIENT_IMAGES:
            gradients.images += len(cosine)
            latents = student.random_latents(len(cosine)).to(subject.device)
            student.compare(gradients, latents, reference, coded)
    return Measured(
        torch.cat(kl) if kl else torch.zeros(len(subject.keys), 0),
        torch.cat(cosines),
        None if student is None else 1 - gradients.gradient_cosine,
    )


def _measure(
    subject: Subject,
    searches: Sequence[Search],
    promise: Promise,
    student: RandomStudent | None = None,
) -> Measured:
    """Errors with the chosen steps, which become a point of every search."""
    curves = [
        CalibrationCurve(
            columns=search.columns, layer=search.row, codec=search.codec(search.chosen), points=()
        )
        for search in searches
    ]
    columns = with_steps(subject.columns, curves)
    found = _compare(subject, _coded(subject, columns), student)
    for search in searches:
        kl = None
        if search.row is not None:
            kl = found.kl[:, search.row]
        elif search.columns == ("tokens",) and found.kl.shape[1]:
            kl = found.kl.mean(1)
        cosine = found.cosine if search.row is None else None
        shares = []
        if kl is not None:
            shares.append(upper_bound(kl) / promise.kl)
        if cosine is not None:
            shares.append(upper_bound(cosine) / (1 - promise.feature_cosine))
        search.points[search.chosen] = CalibrationPoint(
            codec=search.codec(search.chosen),
            kl=None if kl is None else _rounded(float(kl.mean())),
            feature_cosine=None if cosine is None else _cosine(float(cosine.mean())),
            share=_rounded(max(shares)),
        )
    return found


def upper_bound(errors_M: Tensor) -> float:
    """The mean and ``STANDARD_ERRORS`` of it, over images. One image does not tell how others
    differ: their standard deviation is taken to be the mean."""
    errors = errors_M.double()
    mean = float(errors.mean())
    spread = float(errors.std()) if len(errors) > 1 else mean
    return mean + STANDARD_ERRORS * spread / math.sqrt(len(errors))


def _share_cbrt8(searches: Sequence[Search]) -> None:
    """Give all layers cbrt8 where one needs it: a column has one formula."""
    roots = [search for search in searches if search.family == "sqrt"]
    if any(search.chosen == search.finest for search in roots):
        for search in roots:
            search.chosen = search.finest


def _best(search: Search) -> int:
    """The coarsest measured levels that keep the promise, else the finest measured ones."""
    if search.needs_cbrt8:
        return search.finest
    good = [levels for levels, point in search.points.items() if keeps(point.share)]
    return min(good) if good else max(search.points, default=search.start)


def _gradient(found: Measured) -> float:
    assert found.gradient is not None
    return found.gradient


def _curves(searches: Sequence[Search], layers: tuple[int, ...]) -> Iterator[CalibrationCurve]:
    for search in searches:
        yield CalibrationCurve(
            columns=search.columns,
            layer=None if search.row is None else layers[search.row],
            codec=search.codec(search.chosen),
            points=tuple(search.points[levels] for levels in sorted(search.points)),
        )


def _errors(found: Measured) -> TargetErrors:
    kl = float(found.kl.mean()) if found.kl.shape[1] else None
    return TargetErrors(
        kl=None if kl is None else _rounded(kl),
        feature_cosine=_cosine(float(found.cosine.mean())),
        gradient_cosine=_cosine(_gradient(found)),
    )


def _rounded(value: float) -> float:
    """Four digits: the last ones of a float depend on the machine."""
    return float(f"{value:.4g}") if math.isfinite(value) else 1e9


def _cosine(error: float) -> float:
    return round(1 - _rounded(error), 12)


def _unkept(subject: Subject, search: Search, codec: CalibratedSet, promise: Promise) -> UserError:
    point = search.points[search.chosen]
    where = " and ".join(search.columns)
    if search.row is not None:
        where += f" of layer {subject.teacher.layers[search.row]}"
    bounds, found, options = [], [], []
    if point.kl is not None:
        bounds.append(f"KL {promise.kl:g}")
        found.append(f"KL {point.kl:.2e}")
        options.append("--codec.kl")
    if point.feature_cosine is not None:
        bounds.append(f"feature cosine {promise.feature_cosine:g}")
        found.append(f"feature cosine {point.feature_cosine:.6f}")
        options.append("--codec.feature-cosine")
    return UserError(
        f"--codec {codec}: no step of {where} keeps {' and '.join(bounds)} with a margin of "
        f"{MARGIN:.0%}: the finest, {point.codec}, has {' and '.join(found)} over "
        f"{len(subject.keys)} images; ask for less with {' or '.join(options)}, or store it "
        f"without steps: --column-codecs.{search.columns[0]} float32"
    )
