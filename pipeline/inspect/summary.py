"""A store in numbers."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.store import Store


@dataclass(frozen=True)
class StoreSummary:
    """What is committed, and what is missing."""

    samples: int
    bytes_per_stream: dict[str, int]
    missing_shards: list[int]

    @property
    def complete(self) -> bool:
        return not self.missing_shards

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
        }


def summarise(store: Store) -> StoreSummary:
    """From the commit records (of a complete store, from its index)."""
    missing = store.missing_shards()
    index = store.build_index() if missing else store.index()
    return StoreSummary(sum(index.samples_per_shard), index.bytes_per_stream, missing)


def describe(store: Store, summary: StoreSummary) -> str:
    """The page that a person reads."""
    m = store.manifest
    teacher, vae = m.teacher, m.autoencoder
    state = (
        "complete"
        if summary.complete
        else (
            f"INCOMPLETE: {len(summary.missing_shards)} of {m.num_shards} shards are missing "
            f"(first: {summary.missing_shards[0]})"
        )
    )
    origin = (
        f"not run here: latents taken over from {m.dataset.source}"
        if vae.weights_sha256 is None
        else vae.weights_sha256[:12]
    )
    layers = ", ".join(str(layer) for layer in teacher.layers)
    lines = [
        f"{store.shown_url}: {state}",
        f"  data set     {m.dataset.name} from {m.dataset.source or 'its package'}, "
        f"{m.dataset.num_classes} classes, {m.resolution} px",
        f"  samples      {summary.samples} in {m.num_shards} shards of {m.shard_size}, {m.format}",
        f"  teacher      {teacher.model}, weights {teacher.weights} "
        f"({teacher.weights_sha256[:12]}), {teacher.grid[0]}x{teacher.grid[1]} tokens, "
        f"{teacher.heads} heads",
        f"  cut          {m.cut}: attention of layers {layers}; {m.compute.precision} arithmetic",
        f"  autoencoder  {vae.name} ({origin}), latents "
        f"{'x'.join(str(n) for n in vae.latent_shape)}, scaling factor {vae.scaling_factor:g}",
    ]
    for name, size in summary.bytes_per_stream.items():
        each = size / summary.samples if summary.samples else 0
        columns = ", ".join(
            f"{column} {'x'.join(str(n) for n in spec.shape) or 'scalar'} {spec.codec}"
            for column, spec in m.streams[name].columns.items()
        )
        lines.append(f"  stream       {name}: {_bytes(size)}, {_bytes(each)} per image ({columns})")
    lines.append(f"  per image    {_bytes(summary.bytes_per_image)}")
    if m.skipped:
        lines.append(f"  skipped      {len(m.skipped)} bad images, first: {m.skipped[0].path}")
    return "\n".join(lines)


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
