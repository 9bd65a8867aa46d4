"""Options of the drill."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from schemas.base import Strict


class DrillOptions(Strict):
    """Options of ``python -m tests.cluster``."""

    folder: str | None = None
    """Folder to work in: store, runs and logs. It must be empty or missing."""
    losses: Annotated[int, Field(ge=1)] = 20
    """Nodes to lose, while others join."""
    nodes: Annotated[int, Field(ge=2)] = 4
    """Most nodes at a time, of one CPU and one worker each; the fewest is one."""
    seed: int = 0
    """Determines which node is lost, when, and when others join. Every other loss comes with a
    notice: the first one of an even seed."""
    minutes: Annotated[float, Field(gt=0)] | None = None
    """Minutes after which no more nodes are lost, so that the comparison is reached on a crowded
    machine too; none: all of them are."""
    grace: Annotated[float, Field(ge=5)] = 20.0
    """Seconds between a notice and the end of its node."""
    network: Literal["auto", "namespaces", "loopback"] = "auto"
    """'namespaces': each node has a network namespace of its own, whose link can be slow; 'auto':
    where root can make them."""
    disk: Literal["auto", "small", "plain"] = "auto"
    """'small': the output is a small tmpfs, which is full for a while; 'auto': where root can
    mount one."""
    as_json: Annotated[bool, Field(alias="json")] = False
    """Print one JSON object instead of lines."""
