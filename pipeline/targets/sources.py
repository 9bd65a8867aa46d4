"""Training targets from the cut that a store holds."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from pipeline.alignment.losses import Targets
from pipeline.store import Store, StreamReader
from pipeline.store.codecs import decoder_of, sums_to_one
from pipeline.store.codecs.rice import RicePerToken
from pipeline.targets.kinds import TARGET_KINDS, check_target, target_normalisation
from pipeline.teachers.attention_tap import qk_logits
from schemas.alignment import AlignmentConfig, StreamAlignment, TargetKind, place
from schemas.errors import UserError
from schemas.fields import element_count
from schemas.networks import TeacherInfo
from schemas.store import Manifest
from schemas.streams import TeacherStream
from schemas.student import StudentConfig

if TYPE_CHECKING:
    from pipeline.teachers import Teacher


class TargetSource(Protocol):
    """Decodes one cut's stream into targets, in batches, on the training device."""

    stream: str
    """Name of the stream that it decodes."""

    def __call__(self, columns: Mapping[str, Tensor]) -> Targets:
        """Targets of the stream's stored arrays (B, ...), already on the device."""


class MapsTargets:
    """Targets from the ``maps`` cut, which stores them as the losses need them."""

    def __init__(
        self,
        name: str,
        stream: TeacherStream,
        wanted: Wanted,
        *,
        device: torch.device | str = "cpu",
        compiled: bool = False,
    ) -> None:
        self.stream = name
        self.wanted = wanted
        # looked up here, because the compiler cannot trace the lookup
        self._decoders = {n: decoder_of(n, column) for n, column in stream.columns.items()}
        maps = stream.columns.get("attention")
        self._normalise = maps is not None and not sums_to_one(maps.codec)
        places = [stream.teacher.layers.index(layer) for layer in wanted.layers]
        # on the device from the start: a copy during a step would wait for the device
        self._index = torch.tensor(places, dtype=torch.int64, device=device)
        self._attention = _compiled(self.decode_attention) if compiled else self.decode_attention
        self._normalise_target = target_normalisation(wanted.strength, compiled=compiled)

    def __call__(self, columns: Mapping[str, Tensor]) -> Targets:
        features = attention = None
        if self.wanted.features:
            features = self._normalise_target(self._decoders["features"](columns).float())
        if self.wanted.layers:
            attention = self._attention(_without_uint16(columns), self._index)
        return Targets(features, attention)

    def decode_attention(self, columns: Mapping[str, Tensor], layers: Tensor) -> Tensor:
        """Probabilities (B, L, H, N, N) of the stored layers with these indices."""
        attention = self.decode_layers("attention", columns, layers)
        if self._normalise:
            attention = attention / attention.sum(-1, keepdim=True)
        return attention

    def decode_layers(self, name: str, columns: Mapping[str, Tensor], layers: Tensor) -> Tensor:
        """A column (B, L, H, ...) of these layers and the heads of the losses. All its stored
        arrays begin with these dimensions, so that other layers and heads are not decoded."""
        decode, heads = self._decoders[name], self.wanted.heads
        chosen = {
            part: columns[part][:, :, :heads].index_select(1, layers)
            for part in decode.names.values()
        }
        return decode(chosen).float()


class QkTargets(MapsTargets):
    """Targets from the ``qk`` cut: one matrix product gives the logits."""

    def decode_attention(self, columns: Mapping[str, Tensor], layers: Tensor) -> Tensor:
        query, key = (self.decode_layers(name, columns, layers) for name in ("query", "key"))
        return torch.softmax(qk_logits(query, key), dim=-1)


class ReplayedTargets:
    """Targets from the ``activations`` and ``image`` cuts: the teacher's tail runs on the stored
    tensors, with the precision of the extraction."""

    def __init__(
        self,
        name: str,
        stream: TeacherStream,
        teacher: Teacher,
        wanted: Wanted,
        *,
        compiled: bool = False,
    ) -> None:
        self.stream = name
        self.cut = stream.cut
        name = "crop" if self.cut == "image" else "tokens"
        decoder = decoder_of(name, stream.columns[name])
        self._decode = decoder.__call__
        if compiled and isinstance(decoder.codec, RicePerToken):
            self._decode = _compiled(self._decode)  # uncompiled, it takes tens of passes
        self.teacher = teacher
        self.wanted = wanted
        self.dtype = getattr(torch, stream.compute.precision)
        self.stop = teacher.depth if wanted.features else max(wanted.layers) + 1
        self._normalise_target = target_normalisation(wanted.strength)
        self._replay = _compiled(self.replay) if compiled else self.replay

    @torch.no_grad()
    def __call__(self, columns: Mapping[str, Tensor]) -> Targets:
        return Targets(*self._replay(_without_uint16(columns)))

    def replay(self, columns: Mapping[str, Tensor]) -> tuple[Tensor | None, Tensor | None]:
        """Features and attention of ``Targets``: decoding, blocks, softmax and normalisation."""
        teacher, wanted = self.teacher, self.wanted
        stored = self._decode(columns)
        features = attention = None
        with torch.autocast(stored.device.type, self.dtype, enabled=self.dtype != torch.float32):
            if self.cut == "image":
                tokens = teacher.embed(teacher.preprocess(stored.permute(0, 3, 1, 2)))
            else:
                tokens = stored.float()
            if wanted.features:
                read = TARGET_KINDS[wanted.kind]
                features, attended = read(teacher, tokens, wanted.summed)
            else:
                _, attended = teacher.tap_blocks(tokens, teacher.first_block, self.stop)
        if features is not None:
            features = self._normalise_target(features)
        if wanted.layers:
            patches = [attended[layer].patches(teacher.prefix) for layer in wanted.layers]
            logits = [qk_logits(q[:, : wanted.heads], k[:, : wanted.heads]) for q, k in patches]
            attention = torch.softmax(torch.stack(logits, dim=1), dim=-1)
        return features, attention


def _without_uint16(columns: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The columns, with bfloat16 numbers, stored as uint16, as int16: GPUs cannot index uint16."""
    return {
        part: stored.view(torch.int16) if stored.dtype == torch.uint16 else stored
        for part, stored in columns.items()
    }


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Fuse element-wise operations into one pass over the maps. Compiled for each batch size,
    because dynamic graphs are slower and one smaller batch would switch to them for good."""
    return torch.compile(function, dynamic=False)


class Wanted(NamedTuple):
    """Targets that the losses need."""

    features: bool
    layers: tuple[int, ...]
    """The teacher layer of each pair, 0-based; empty without the attention loss."""
    heads: int
    """Number of heads of each layer, counted from the first."""
    kind: TargetKind = "final"
    """Teacher tokens that are the features."""
    summed: tuple[int, ...] = ()
    """sum_of_layers: the layers."""
    strength: float | None = None
    """Strength of the features' spatial normalisation; None: none."""


def wanted_targets(options: StreamAlignment, heads: int) -> Wanted:
    """Targets that the losses of a stream need."""
    layers = options.teacher_layers if options.attention_weight else ()
    return Wanted(
        bool(options.feature_weight),
        layers,
        heads,
        options.target,
        options.target_layers or (),
        options.normalisation_strength,
    )


def open_targets(
    store: Store,
    name: str | None,
    wanted: Wanted,
    device: torch.device,
    *,
    compiled: bool = False,
) -> TargetSource:
    """The target source for the cut of a store's teacher stream. ``compiled``: it is one graph of
    torch.compile, the teacher's blocks included. Raises ``UserError``."""
    name, stream = store.manifest.teacher_stream(name)
    if wanted.layers:
        tokens = math.prod(stream.teacher.grid)
        try:
            element_count((len(wanted.layers), wanted.heads, tokens, tokens))
        except ValueError as error:
            raise UserError(f"the attention of one image in stream '{name}': {error}") from None
    if stream.cut in {"activations", "image"}:
        from pipeline.targets.tail import load_tail  # timm takes seconds to import

        teacher = load_tail(store, name, sorted(set(wanted.layers)))
        return ReplayedTargets(name, stream, teacher.to(device), wanted, compiled=compiled)
    kind = MapsTargets if stream.cut == "maps" else QkTargets
    return kind(name, stream, wanted, device=device, compiled=compiled)


def read_targets(
    store: Store, shards: np.ndarray, rows: np.ndarray, wanted: Wanted, name: str | None = None
) -> Targets:
    """Targets of single samples, on the CPU, for inspection. B = len(rows)."""
    source = open_targets(store, name, wanted, torch.device("cpu"))
    columns = StreamReader(store, source.stream).read(shards, rows)
    return source({part: torch.from_numpy(array) for part, array in columns.items()})


def aligned_heads(student: StudentConfig, teacher: TeacherInfo) -> int:
    """Number of aligned heads: student head i follows teacher head i, so the smaller number."""
    return min(student.size.heads, teacher.heads)


def check_fit(alignment: AlignmentConfig, manifest: Manifest) -> None:
    """Raises ``UserError`` when the store lacks teacher layers that the alignment needs."""
    for number, options in enumerate(alignment.streams):
        check_stream(options, manifest, at=place(number))


def check_stream(options: StreamAlignment, manifest: Manifest, *, at: str = "alignment") -> None:
    """``check_fit`` of one stream; ``at``: the key of its options."""
    name, stream = manifest.teacher_stream(options.stream)
    teacher = stream.teacher
    if options.feature_weight:
        check_target(options, name, stream, at=at)
    if options.attention_weight:
        missing = sorted(set(options.teacher_layers) - set(teacher.layers))
        if missing:
            raise UserError(
                f"{at}.teacher_layers asks for teacher layer {_join(missing)}; the "
                f"store holds {_join(teacher.layers) or 'none'}: extract again with --layers that "
                "include it"
            )


def _join(layers: Sequence[int]) -> str:
    return ", ".join(str(layer) for layer in layers)
