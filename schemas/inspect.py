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
