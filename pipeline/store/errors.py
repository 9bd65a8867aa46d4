"""What is wrong with a shard's bytes."""

from __future__ import annotations

from schemas.errors import UserError


class DamagedShardError(UserError):
    """Bytes of a shard are not those that were committed: names stream, shard and, where one is to
    blame, sample. Never raised because storage is away."""


class LostShardError(DamagedShardError):
    """No sample of the shard can be read in this stream, whichever was asked for."""


class UncommittedShardError(UserError):
    """The store is not complete: a shard was never committed, which is no damage."""


class DamagedArrayError(Exception):
    """A stored array of the sample at ``number`` of those asked for; not yet where that is."""

    def __init__(self, number: int, name: str, reason: str) -> None:
        super().__init__(reason)
        self.number = number
        self.name = name
        self.reason = reason
