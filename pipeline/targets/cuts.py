"""Cuts of the teacher's forward pass: the tensors stored of an image, and their codecs."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal, get_args

from pipeline.store.codecs import encode_column, find_codec, same_numbers
from schemas.calibration import CalibrationCurve
from schemas.codecs import CodecName, CodecSet
from schemas.cuts import TeacherShape, cut_shapes
from schemas.errors import UserError
from schemas.extract import Cut
from schemas.streams import CLASS_CODECS, ClassToken, Column, TeacherStream

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.teachers import Teacher

Kind = Literal["activations", "features", "factors", "probabilities", "vector"]
"""Kinds of tensors, which decide the codec."""
KINDS: tuple[Kind, ...] = get_args(Kind)

CODEC_SETS: dict[CodecSet, dict[Kind, CodecName]] = {
    "faithful": {
        "activations": "rice23",
        "features": "rms26",
        "factors": "heads28",
        "probabilities": "cbrt8",
        "vector": "float16",
    },
    "small": {
        "activations": "tokens9",
        "features": "rms8",
        "factors": "heads12",
        "probabilities": "sqrt220",
        "vector": "float16",
    },
    "int8": {
        "activations": "int8_centred",
        "features": "int8_centred",
        "factors": "int8",
        "probabilities": "cbrt8",
        "vector": "float16",
    },
    "bfloat16": dict.fromkeys(KINDS, "bfloat16"),
    "float16": dict.fromkeys(KINDS, "float16"),
    "float32": dict.fromkeys(KINDS, "float32"),
}
"""Codecs of each set of ``--codec``; tests/bench/RESULTS.md lists their bytes and errors."""


KIND_OF: dict[str, Kind] = {
    "tokens": "activations",
    "features": "features",
    "class_token": "vector",
    "attention": "probabilities",
    "query": "factors",
    "key": "factors",
}
"""Kind of each tensor except the crop."""


def cut_columns(
    cut: Cut,
    teacher: TeacherShape,
    resolution: int,
    codec: CodecSet,
    overrides: Mapping[str, CodecName] | None = None,
    *,
    compress: bool = True,
) -> dict[str, Column]:
    """The columns of a cut's stream; ``compress`` allows lossless compression.

    Raises ``UserError`` when ``overrides`` names a tensor that the cut lacks, or a codec that does
    not support the tensor's shape.
    """
    columns = {
        name: _column(shape, CODEC_SETS[codec][KIND_OF[name]], compress)
        if name in KIND_OF
        else Column(shape=shape, codec="uint8")
        for name, shape in cut_shapes(cut, teacher, resolution).items()
    }
    for name, chosen in (overrides or {}).items():
        if name not in columns:
            raise UserError(
                f"--column-codecs.{name}: cut '{cut}' has no tensor of this name, only "
                f"{', '.join(columns)}"
            )
        try:
            columns[name] = _column(columns[name].shape, chosen, compress)
        except ValueError as error:
            raise UserError(f"--column-codecs.{name} {chosen}: {error}") from None
    return columns


def class_columns(
    width: int,
    codec: CodecSet,
    overrides: Mapping[str, CodecName] | None = None,
    *,
    compress: bool = True,
) -> dict[str, Column]:
    """The columns of a class stream, whose codec is that of a cut's ``class_token``. Raises
    ``UserError`` for one that is not a float type."""
    chosen = (overrides or {}).get("class_token", CODEC_SETS[codec]["vector"])
    if chosen not in CLASS_CODECS:
        raise UserError(
            f"--column-codecs.class_token {chosen}: the class stream takes "
            f"{', '.join(CLASS_CODECS)}; with others use --class-token none"
        )
    return {"class_token": _column((width,), chosen, compress)}


def codec_set_of(stream: TeacherStream) -> CodecSet | None:
    """The codec set that a stream's columns were stored with; None for crops and mixed codecs."""
    measured = set() if stream.calibration is None else stream.calibration.columns
    sets = CODEC_SETS if stream.calibration is None else [stream.calibration.codec]
    rest = {name: c.codec for name, c in stream.columns.items() if name not in measured}
    if stream.columns.keys() <= KIND_OF.keys():
        for codec in sets:
            chosen = CODEC_SETS[codec]
            if all(same_numbers(own, chosen[KIND_OF[name]]) for name, own in rest.items()):
                return codec
    return None


def stepped_columns(columns: Iterable[str], fixed: Collection[str]) -> list[str]:
    """Columns whose step a calibration chooses: quantised by the codec sets, and not ``fixed``."""
    return [
        name for name in columns if name not in fixed and KIND_OF.get(name, "vector") != "vector"
    ]


def with_steps(
    columns: Mapping[str, Column], curves: Sequence[CalibrationCurve]
) -> dict[str, Column]:
    """The columns with the codecs that a calibration chose. Curves of layers are in their order."""
    changed = dict(columns)
    for name, column in columns.items():
        codecs = [curve.codec for curve in curves if name in curve.columns]
        if not codecs:
            continue
        finest = max(codecs, key=lambda codec: find_codec(codec).levels)
        if "cbrt8" in codecs:  # another formula: its column has no other codec
            codecs = [finest := "cbrt8"]
        levels = [find_codec(codec).levels for codec in codecs]
        changed[name] = Column(
            shape=column.shape,
            codec=finest,
            lossless=column.lossless,
            levels=tuple(levels) if len(set(levels)) > 1 else (),
        )
    return changed


def _column(shape: tuple[int, ...], codec: CodecName, compress: bool) -> Column:
    found = find_codec(codec)
    found.arrays(shape)  # raises for a shape that the codec does not support
    return Column(shape=shape, codec=codec, lossless=found.lossless if compress else "none")


def cut_values(cut: Cut, teacher: Teacher, images_B3RR: Tensor) -> dict[str, Tensor]:
    """The cut's tensors of a batch of uint8 crops; target sources compute targets from them."""
    if cut == "image":
        return {"crop": images_B3RR.permute(0, 2, 3, 1)}
    return later_cut_values(cut, teacher, teacher.embed(teacher.preprocess(images_B3RR)))


def later_cut_values(
    cut: Cut, teacher: Teacher, tokens: Tensor, start: int = 0
) -> dict[str, Tensor]:
    """The same for a cut other than ``image``, from the tokens (B, P + N, D) that enter the
    teacher's block ``start``."""
    import torch  # here, because drivers that only name columns need none

    if cut == "activations":
        tokens, _ = teacher.run_blocks(tokens, start, teacher.layers[0])
        return {"tokens": tokens.float()}
    tokens, attended = teacher.tap_blocks(tokens, start)
    features, class_token = teacher.normed(tokens)
    values = {"features": features, "class_token": class_token}
    if not teacher.layers:
        return values
    if cut == "maps":
        logits = [attended[layer].logits(teacher.prefix) for layer in teacher.layers]
        values["attention"] = torch.softmax(torch.stack(logits, dim=1), dim=-1)
        return values
    pairs = [attended[layer].patches(teacher.prefix) for layer in teacher.layers]
    values["query"] = torch.stack([query for query, _ in pairs], dim=1)
    # Subtracting the mean key shifts every row of logits by a constant, which its softmax removes;
    # the smaller keys quantise better.
    keys = torch.stack([key for _, key in pairs], dim=1)
    values["key"] = keys - keys.mean(dim=-2, keepdim=True)
    return values


def class_values(
    token: ClassToken, cut: Cut, teacher: Teacher | None, values: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The tensor (B, D) of a class stream from those of a cut. The cuts ``activations`` and
    ``image`` need the teacher, or its tail, whose blocks after the cut are run."""
    if token == "class" and "class_token" in values:
        return {"class_token": values["class_token"]}
    if "features" in values:
        return {"class_token": values["features"].mean(1)}
    assert teacher is not None
    if cut == "image":
        tokens = teacher.embed(teacher.preprocess(values["crop"].permute(0, 3, 1, 2)))
        tokens, _ = teacher.tap_blocks(tokens)
    else:
        tokens, _ = teacher.tap_blocks(values["tokens"], teacher.layers[0])
    features, class_token = teacher.normed(tokens)
    return {"class_token": class_token if token == "class" else features.mean(1)}


def encode_values(columns: Mapping[str, Column], values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The stored arrays of a batch of a cut's tensors, on their device.

    Waits for the device. Raises ``NotFiniteError`` for samples with NaN or infinities, which cannot
    be stored.
    """
    check_finite(not_finite(columns, values))
    return encode_unchecked(columns, values)


def encode_unchecked(
    columns: Mapping[str, Column], values: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """``encode_values`` without its check; arrays of samples that ``not_finite`` marks are
    undefined."""
    stored: dict[str, Tensor] = {}
    for name, column in columns.items():
        stored |= encode_column(name, column, values[name])
    return stored


def not_finite(columns: Iterable[str], values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """For each column of floating-point tensors, (B,) bool on their device: True for samples with
    NaN or infinities."""
    return {
        name: (~values[name].isfinite()).flatten(1).any(1)
        for name in columns
        if values[name].is_floating_point()
    }


def check_finite(flags: Mapping[str, Tensor]) -> None:
    """Raises ``NotFiniteError`` if one of the results of ``not_finite`` is True."""
    for name, bad in flags.items():
        rows: list[int] = bad.nonzero().flatten().tolist()
        if rows:
            raise NotFiniteError(name, rows)


class NotFiniteError(ValueError):
    """A tensor holds NaN or an infinity."""

    def __init__(self, column: str, rows: list[int]) -> None:
        super().__init__(f"{column} holds NaN or an infinity")
        self.column = column
        self.rows = rows
        """Indices of these samples in the batch."""
