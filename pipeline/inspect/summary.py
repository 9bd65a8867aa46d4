"""Summary of a store: samples, bytes, missing shards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.storage.files import file_size, is_local
from pipeline.store import Store, StreamReader
from pipeline.store.captions import caption_lines
from pipeline.store.layout import MANIFEST
from pipeline.text import describe_bytes, short_value, shortened
from schemas.calibration import Calibration
from schemas.classes import ClassTable
from schemas.errors import UserError, escaped
from schemas.networks import AutoencoderInfo
from schemas.store import DatasetInfo
from schemas.streams import ClassStream, Column, TeacherStream, TextStream

MAX_SHOWN = 10
"""Classes that the page shows; ``--json`` has all."""
MAX_COUNTED = 200_000
"""Images whose labels are read to count those of each class."""
MAX_NAME = 40
"""Characters of a class name on the page."""


@dataclass(frozen=True)
class StoreSummary:
    """Committed samples and bytes, and missing shards."""

    samples: int
    bytes_per_stream: dict[str, int]
    missing_shards: list[int]
    """Shards without latents, and so without the streams that were extracted with them."""
    incomplete_streams: dict[str, list[int]]
    """Missing shards of streams that were added later."""
    fixed_bytes: int
    """Bytes that do not depend on the number of images: the manifest, teacher tails and null
    captions."""
    classes: ClassTable
    class_counts: tuple[int, ...] | None = None
    """Images of each class; None where counting them would take long."""

    @property
    def complete(self) -> bool:
        return not (self.missing_shards or self.incomplete_streams)

    @property
    def bytes_per_image(self) -> float:
        """Committed shard bytes of all streams over samples."""
        return sum(self.bytes_per_stream.values()) / self.samples if self.samples else 0.0

    def as_json(self) -> dict[str, object]:
        return {
            "samples": self.samples,
            "complete": self.complete,
            "streams": self.bytes_per_stream,
            "bytes_per_image": self.bytes_per_image,
            "fixed_bytes": self.fixed_bytes,
            **({"class_names": self.classes.names} if self.classes.names else {}),
            **({"empty_classes": self.classes.empty} if self.classes.empty else {}),
        }


def summarise(store: Store) -> StoreSummary:
    """Reads the index of a complete store, else the commit records."""
    missing = store.missing_shards()
    added = {name: store.missing_shards(name) for name in store.added_streams}
    incomplete = {name: shards for name, shards in added.items() if shards}
    index = store.build_index() if missing or incomplete else store.index()
    fixed = sum(file.bytes for file in store.manifest.weights_files.values())
    fixed += file_size(store.filesystem, f"{store.root}/{MANIFEST}")
    return StoreSummary(
        sum(index.samples_per_shard),
        index.bytes_per_stream,
        missing,
        incomplete,
        fixed,
        store.manifest.dataset.classes,
        count_classes(store, sum(index.samples_per_shard)),
    )


def count_classes(store: Store, samples: int) -> tuple[int, ...] | None:
    """Images of each class in the committed shards of a local store of up to ``MAX_COUNTED``."""
    dataset = store.manifest.dataset
    if dataset.dummy_class or samples > MAX_COUNTED or not is_local(store.filesystem):
        return None
    reader = StreamReader(store, "latents", columns=["label"])
    counts = np.zeros(dataset.num_classes, np.int64)
    for shard in sorted(store.committed_shards()):
        rows = np.arange(store.record(shard).samples)
        try:
            labels = reader.read(np.full_like(rows, shard), rows)["label"]
        except (UserError, OSError):  # --verify reports it
            return None
        known = labels[(labels >= 0) & (labels < len(counts))]
        counts += np.bincount(known, minlength=len(counts))
    return tuple(counts.tolist())


def describe(store: Store, summary: StoreSummary, orphans: str | None = None) -> str:
    """The summary as lines of text; ``orphans``: their number and size."""
    m = store.manifest
    vae = m.autoencoder
    state = (
        "complete"
        if summary.complete
        else (
            f"INCOMPLETE: {len(summary.missing_shards)} of {m.num_shards} shards are missing "
            f"(first: {summary.missing_shards[0]})"
            if summary.missing_shards
            else f"INCOMPLETE: stream '{next(iter(summary.incomplete_streams))}' lacks shards"
        )
    )
    origin = (
        f"not run here: latents taken over from {m.dataset.source}"
        if vae.weights_sha256 is None
        else vae.weights_sha256[:12]
    )
    lines = [
        f"{store.shown_url}: {state}",
        *_describe_counts(summary),
        f"  data set     {m.dataset.name} from {m.dataset.source or 'its package'}, "
        f"{_labels(m.dataset)}, {m.resolution} px"
        + ("" if m.crop == "adm" else f", crop {m.crop}"),
        *_describe_classes(m.dataset.classes),
        *(f"  captions     {line}" for line in caption_lines(m)),
        f"  samples      {summary.samples} in {m.num_shards} shards of {m.shard_size}, {m.format}",
        f"  autoencoder  {vae.name} ({origin}), latents "
        f"{'x'.join(str(n) for n in vae.latent_shape)}, {_normalisation(vae)}",
    ]
    for name, size in summary.bytes_per_stream.items():
        each = size / summary.samples if summary.samples else 0
        columns = ", ".join(
            f"{column} {'x'.join(str(n) for n in spec.shape) or 'scalar'} {_codec(spec)}"
            for column, spec in m.streams[name].columns.items()
        )
        sizes = f"{describe_bytes(size)}, {describe_bytes(each)} per image"
        lines.append(f"  stream       {name}: {sizes} ({columns})")
        stream = m.streams[name]
        if isinstance(stream, TeacherStream):
            lines += _describe_teacher(stream)
        elif isinstance(stream, TextStream):
            lines += _describe_text(stream)
        elif isinstance(stream, ClassStream):
            kind = "class token" if stream.token == "class" else "mean of the patch tokens"
            lines.append(f"    token      {kind} of {stream.teacher.model}, after its final norm")
            lines += _made_from(stream)
    fixed = (
        f"; {describe_bytes(summary.fixed_bytes)} outside the shards" if summary.fixed_bytes else ""
    )
    lines.append(f"  per image    {describe_bytes(summary.bytes_per_image)}{fixed}")
    if m.skipped:
        lines.append(f"  skipped      {len(m.skipped)} bad images, first: {m.skipped[0].path}")
    if orphans is not None:
        lines.append(f"  orphans      {orphans} without a commit record; --gc removes them")
    return "\n".join(escaped(line) for line in lines)  # names come from the store


def _normalisation(vae: AutoencoderInfo) -> str:
    parts = [f"scaling factor {vae.scaling_factor:g}"]
    if vae.shift_factor:
        parts.append(f"shift factor {vae.shift_factor:g}")
    for key in ("latents_mean", "latents_std"):
        if getattr(vae, key) is not None:
            parts.append(f"{key} {short_value(_listed(getattr(vae, key)))}")
    return ", ".join(parts)


SOURCES = {"model": "model's name", "options": "options"}


def _listed(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def _describe_classes(classes: ClassTable) -> list[str]:
    """Numbers and names of the first classes, and those without images."""
    lines = []
    if classes.names:
        names = (shortened(name, MAX_NAME) for name in classes.names)
        shown = [str(n) if name == str(n) else f"{n} {name}" for n, name in enumerate(names)]
        lines.append(f"  classes      {_first(shown)}")
    if classes.empty:
        empty = [str(number) for number in classes.empty]
        lines.append(f"  no images    {len(empty)} classes: {_first(empty)}")
    return lines


def _describe_counts(summary: StoreSummary) -> list[str]:
    """Images of each class, those with most images first."""
    counts, names = summary.class_counts, summary.classes.names
    if counts is None:
        return [f"  images       {summary.samples:,}"]
    order = sorted(range(len(counts)), key=lambda number: -counts[number])
    labels = [f"of class {number}" for number in range(len(counts))]
    if names:  # a name that is a number looks like a second count
        labels = [
            f"of class {name}" if name.isdecimal() else shortened(name, MAX_NAME) for name in names
        ]
    shown = [f"{counts[n]:,} {labels[n]}" for n in order if counts[n]]
    kinds = f"class{'es' * (len(shown) != 1)}"
    return [f"  images       {summary.samples:,} in {len(shown)} {kinds}: {_first(shown)}"]


def _first(items: Sequence[str]) -> str:
    more = f", and {len(items) - MAX_SHOWN} more" if len(items) > MAX_SHOWN else ""
    return f"{', '.join(items[:MAX_SHOWN])}{more}"


def _labels(dataset: DatasetInfo) -> str:
    split = "" if dataset.split is None else f"split {dataset.split}, "
    if dataset.dummy_class:
        return f"{split}captions and no classes (every label is 0)"
    return f"{split}{dataset.num_classes} classes"


def _describe_text(stream: TextStream) -> list[str]:
    encoder = stream.encoder
    weights = encoder.weights_sha256
    run = "not run here" if weights is None else f"weights {encoder.weights} ({weights[:12]})"
    size = f" x {encoder.width}" if stream.keeps == "embeddings" else ""
    return [
        f"    captions   1 to {stream.captions} an image, {stream.keeps} of {encoder.tokens}{size}",
        f"    encoder    {encoder.encoder}, {run}; tokenizer {encoder.tokenizer}",
        f"    null       {stream.null.file}, {describe_bytes(stream.null.bytes)}",
    ]


def _describe_teacher(stream: TeacherStream) -> list[str]:
    teacher = stream.teacher
    layers = ", ".join(str(layer) for layer in teacher.layers)
    lines = [
        f"    cut        {stream.cut}: attention of layers {layers or 'none'}; "
        f"{stream.compute.precision} arithmetic",
        f"    teacher    {teacher.model}, weights {teacher.weights} "
        f"({teacher.weights_sha256[:12]}), {teacher.grid[0]}x{teacher.grid[1]} tokens, "
        f"{teacher.heads} heads",
        f"    input      {teacher.image_size} px, {teacher.resize}; mean {_listed(teacher.mean)}, "
        f"std {_listed(teacher.std)} of the {SOURCES[teacher.statistics_of]}",
    ]
    lines += _made_from(stream)
    if stream.calibration is not None:
        lines.append(f"    codec      {_describe_calibration(stream.calibration)}")
    if stream.tail is not None:
        lines.append(f"    tail       {stream.tail.file}, {describe_bytes(stream.tail.bytes)}")
    return lines


def _made_from(stream: TeacherStream | ClassStream) -> list[str]:
    """The streams that it was converted or computed from."""
    steps = [
        f"{o.cut} ({', '.join(sorted(set(o.codecs.values())))})" for o in stream.converted_from
    ]
    return [f"    made from  {', then '.join(steps)}"] if steps else []


def _describe_calibration(found: Calibration) -> str:
    kl = "" if found.errors.kl is None else f"KL {found.errors.kl:.2e} of {found.promise.kl:g}, "
    return (
        f"'{found.codec}', steps chosen on {len(found.keys)} images: {kl}feature cosine "
        f"{found.errors.feature_cosine:.6f} of {found.promise.feature_cosine:g}"
    )


def _codec(column: Column) -> str:
    codec = column.codec
    if column.levels:
        codec = f"{codec.rstrip('0123456789')}{'/'.join(map(str, column.levels))}"
    return codec if column.lossless == "none" else f"{codec}+{column.lossless}"
