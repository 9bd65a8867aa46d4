"""The options of ``python -m pipeline.inspect``."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from schemas.base import Strict
from schemas.fields import Name


class TeacherWeights(Strict):
    """Where the teacher's weights lie now."""

    weights: str | None = None
    """--fidelity: weights of the teacher, where not those that the manifest names; others than the
    store was made with are refused."""


class InspectConfig(Strict):
    """What to tell about a store."""

    store: str | None = None
    """Folder or URL of the store."""
    as_json: Annotated[bool, Field(alias="json")] = False
    """Print one JSON object instead of a page."""
    sample: str | None = None
    """Key of a sample to draw, with --png."""
    png: str | None = None
    """The picture file to write."""
    stream: Name | None = None
    """The teacher stream to draw or measure, where the store holds several."""
    fidelity: Annotated[int, Field(ge=1)] | None = None
    """Run the teacher again on so many images and say how far the stored targets are from its
    float32 ones, and what that does to the losses and gradients of a random student."""
    source: str | None = None
    """--fidelity: folder or URL of the images, where not the one that the manifest names."""
    teacher: TeacherWeights = TeacherWeights()
    verify: bool = False
    """Read every committed file and check all checksums; damage is named by stream, shard and
    sample, and makes the exit code 1."""
    threads: Annotated[int, Field(ge=1, le=256)] = 8
    """Files that --verify reads at once."""
    gc: bool = False
    """List and remove what crashes left behind: temporary files, and files that no commit record
    accounts for. Links and files of other names are never removed."""
    gc_age: Annotated[float, Field(ge=0)] = 1.0
    """Hours that such a file must be old to be removed: an extraction that is running has some,
    too."""
    check: tuple[str, ...] = ()
    """Training configs (--check A.yaml B.yaml ...): say which of them the store can train, what the
    others lack, and how to add it. Exit code 1 where one cannot be trained."""
