"""Errors of a codec in the targets of a config, found without the teacher's images."""

from __future__ import annotations

import numpy as np
import torch

from pipeline.store import Store, StreamReader
from pipeline.store.codecs import decode_column, encode_column
from pipeline.targets.sources import MapsTargets, ReplayedTargets, open_targets, wanted_targets
from schemas.alignment import StreamAlignment
from schemas.streams import Column

SAMPLES = 4
"""Images of the first shard that are compared."""
SHIFT = 0.2
"""Deviation of the noise, relative to the tensor's RMS, that moves stored numbers off the codec's
steps, where they would be stored without an error: more than the coarsest step, an eighth."""
MAX_ERROR = 1e-3
"""1 - cosine of a target and its stored form up to which a codec is fine enough: 'faithful' stays
at a fifth of it under iREPA's normalisation, 'small' exceeds it."""


def coarse_codec(store: Store, name: str, options: StreamAlignment) -> str | None:
    """A warning where the codec of a stream is too coarse for the normalised targets of a run:
    without the mean of a channel, the same error is a larger share of what remains. None for other
    targets, whose errors tests/bench/RESULTS.md lists, and where the first shard has nothing to
    compare."""
    stream = store.manifest.teacher_streams[name]
    if options.normalisation == "none" or not options.feature_weight or stream.cut == "image":
        return None
    error = _target_error(store, name, options)
    if error is None or error <= MAX_ERROR:
        return None
    column = "tokens" if stream.cut == "activations" else "features"
    return (
        f"warning: codec {stream.columns[column].codec} of stream '{name}' moves targets with "
        f"normalisation {options.normalisation} by 1 - cosine {error:.1e}, more than "
        f"{MAX_ERROR:g}; measure it with --fidelity, or store {column} in a finer codec "
        "(--codec faithful)"
    )


@torch.no_grad()
def _target_error(store: Store, name: str, options: StreamAlignment) -> float | None:
    """Mean of 1 - cosine over tokens, of targets from the stored numbers and from these with the
    codec's error once more. Raises ``UserError`` where a file cannot be read."""
    stream = store.manifest.teacher_streams[name]
    column = "tokens" if stream.cut == "activations" else "features"
    spec = stream.columns[column]
    rows = np.arange(min(SAMPLES, store.record(0, name).samples))
    if not rows.size:
        return None
    arrays = StreamReader(store, name, columns=[column]).read(np.zeros_like(rows), rows)
    stored = {part: torch.from_numpy(array) for part, array in arrays.items()}
    values = decode_column(column, spec, stored).float()
    noise = torch.randn(values.shape, generator=torch.Generator().manual_seed(0))
    moved = values + SHIFT * values.square().mean().sqrt() * noise
    error = decode_column(column, spec, encode_column(column, spec, moved)).float() - moved
    wanted = wanted_targets(options, heads=1)._replace(layers=())
    source = open_targets(store, name, wanted, torch.device("cpu"))
    exact_columns = {column: Column(shape=spec.shape, codec="float32")}
    exact_stream = stream.model_copy(update={"columns": exact_columns})
    exact = (
        ReplayedTargets(name, exact_stream, source.teacher, wanted)
        if isinstance(source, ReplayedTargets)
        else MapsTargets(name, exact_stream, wanted)
    )
    one, other = exact({column: values}), exact({column: values + error})
    assert one.features is not None
    assert other.features is not None
    cosine = torch.cosine_similarity(one.features, other.features, dim=-1)
    present = one.features.any(-1)  # constant channels are 0, as are the tokens of flat images
    return float(1 - cosine[present].mean()) if present.any() else None
