"""Class tokens of a store, the part of REG's data that comes from the teacher."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from pipeline.store import Store, StreamReader
from pipeline.store.codecs import decoder_of
from schemas.alignment import AlignmentConfig
from schemas.store import Manifest


class ClassTokens:
    """Decodes a class stream, in batches, on the training device."""

    def __init__(self, manifest: Manifest, name: str | None = None) -> None:
        """``name``: a class stream, or a teacher stream whose teacher's tokens are wanted. Raises
        ``UserError`` where the store has none."""
        self.stream, info = manifest.class_stream(name)
        self.teacher = info.teacher
        # looked up here, because the compiler cannot trace the lookup
        self._decode = decoder_of("class_token", info.columns["class_token"])

    def __call__(self, columns: Mapping[str, Tensor]) -> Tensor:
        """float32 (B, D) from the stream's stored arrays (B, ...), neither scaled nor normalised
        (REG, arXiv 2507.01467, section 3)."""
        return self._decode(columns).float()

    def aligned_streams(self, alignment: AlignmentConfig, manifest: Manifest) -> list[int]:
        """Numbers of the aligned streams whose feature loss aligns the token too: of the same
        teacher, and with a place for it."""
        return [
            number
            for number, options in enumerate(alignment.streams)
            # a convolution has no place for it, and the token is that after the final norm
            if (options.projector, options.target) == ("mlp", "final")
            and manifest.teacher_stream(options.stream)[1].teacher.same_network(self.teacher)
        ]


def read_class_tokens(
    store: Store, shards: np.ndarray, rows: np.ndarray, name: str | None = None
) -> Tensor:
    """Class tokens of single samples, float32 (len(rows), D), on the CPU."""
    tokens = ClassTokens(store.manifest, name)
    columns = StreamReader(store, tokens.stream).read(shards, rows)
    return tokens({part: torch.from_numpy(array) for part, array in columns.items()})
