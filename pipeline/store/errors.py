"""Errors of a shard's contents."""

from __future__ import annotations

from schemas.errors import UserError


class DamagedShardError(UserError):
    """Bytes of a shard are not those that were committed. The message names stream, shard and, if
    known, sample. Never raised because storage cannot be reached."""


class LostShardError(DamagedShardError):
    """No sample of the shard can be read in this stream."""


class UncommittedShardError(UserError):
    """The store is incomplete: a shard was never committed, which is not damage."""


class DamagedArrayError(Exception):
    """A stored array of the sample with index ``number`` in a request is damaged."""

    def __init__(self, number: int, name: str, reason: str) -> None:
        super().__init__(reason)
        self.number = number
        self.name = name
        self.reason = reason
