"""Conversion of one shard of the streams that are committed together."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.convert.converters import Converter
from pipeline.convert.streams import StreamPlan
from pipeline.store import ShardWriter, Store, StreamReader
from pipeline.targets.cuts import NotFiniteError
from schemas.errors import UserError

COPIED_AT_ONCE = 8
"""Samples per batch where nothing is computed."""


@dataclass(frozen=True)
class Group:
    """Streams under one commit record."""

    added: str | None
    """Name in the target of an added stream; None for the streams committed with the latents."""
    plans: Sequence[StreamPlan]

    @property
    def batch_size(self) -> int:
        """The batch size of the extraction, because it changes the last bits."""
        sizes = [plan.before.compute.batch_size for plan in self.plans if plan.computes]
        return max(sizes, default=COPIED_AT_ONCE)


class CancelledError(Exception):
    """Another shard has failed, or the user has interrupted the command."""


def convert_shard(
    source: Store,
    target: Store,
    group: Group,
    shard: int,
    converters: Mapping[str, Converter],
    stop: threading.Event,
) -> int:
    """Write and commit one shard. Returns its number of samples.

    Batches are cut by position in the shard, so that the result does not depend on the worker.
    Raises ``UserError`` when the source is damaged, a number cannot be stored or storage fails, and
    ``CancelledError`` after the current batch once ``stop`` is set.
    """
    record = source.record(shard, group.plans[0].source)
    readers = {
        plan.name: StreamReader(source, plan.source, columns=plan.reads, cache_files=1)
        for plan in group.plans
    }
    keys: Sequence[str] = ()
    try:
        with ShardWriter(target.url, target.manifest, shard, added=group.added) as writer:
            for start in range(0, record.samples, group.batch_size):
                if stop.is_set():
                    raise CancelledError
                keys = record.keys[start : start + group.batch_size]
                rows = np.arange(start, start + len(keys))
                shards = np.full_like(rows, shard)
                batch = {
                    name: converters[name](reader.read(shards, rows))
                    for name, reader in readers.items()
                }
                for i, key in enumerate(keys):
                    writer.add(
                        key,
                        {
                            name: {part: values[i] for part, values in parts.items()}
                            for name, parts in batch.items()
                        },
                    )
            writer.commit(skipped=record.skipped)
    except NotFiniteError as error:
        raise UserError(
            f"shard {shard}, sample '{keys[error.rows[0]]}': the converted {error}"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"shard {shard} of {target.shown_url}: {error}") from None
    return record.samples
