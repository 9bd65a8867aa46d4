"""Options of ``python -m pipeline.inspect``."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from schemas.base import Strict
from schemas.fields import Name


class TeacherWeights(Strict):
    """Location of the teacher's weights."""

    weights: str | None = None
    """--fidelity: weights of the teacher, if not at the place that the manifest names. They must be
    the weights that the store was made with."""


class InspectConfig(Strict):
    """Options of an inspection."""

    store: str | None = None
    """Folder or URL of the store."""
    as_json: Annotated[bool, Field(alias="json")] = False
    """Print one JSON object instead of text."""
    sample: str | None = None
    """Key of a sample to show, with --png."""
    png: str | None = None
    """The image file to write: with --sample that sample, alone a contact sheet (the decoded
    latents of the first images of each class)."""
    stream: Name | None = None
    """Teacher stream of --sample or --fidelity, where the store holds several."""
    fidelity: Annotated[int, Field(ge=1)] | None = None
    """Number of images on which the teacher is run again, to report the error of the stored targets
    against float32 and its effect on the losses and gradients of a random student. Where the
    extraction chose the codecs' steps by a calibration, other images than the calibration's are
    taken, and exit code 1 says that its promise is not kept on them."""
    recipe: str | None = None
    """--fidelity: a training config (also --config, beside --fidelity). Only the targets of its
    losses are compared, as they enter the losses, with their normalisation, for a random student of
    its depth, heads, projector and weights."""
    source: str | None = None
    """--fidelity: folder or URL of the images, if not at the place that the manifest names."""
    teacher: TeacherWeights = TeacherWeights()
    verify: bool = False
    """Read every committed file and check all checksums. Damage is reported by stream, shard and
    sample, with exit code 1."""
    threads: Annotated[int, Field(ge=1, le=256)] = 8
    """Files that --verify reads at the same time."""
    gc: bool = False
    """List and remove leftovers of crashes: temporary files, and files without a commit record.
    Links and files with other names are never removed."""
    gc_age: Annotated[float, Field(ge=0)] = 1.0
    """Minimum age in hours of the files that --gc removes, because a running extraction has such
    files too."""
    check: tuple[str, ...] = ()
    """Training configs (--check A.yaml B.yaml ..., or a folder of them): report which of them the
    store can train, and for the others what is missing and how to add it. Exit code 1 if one cannot
    be trained. --check alone: a table of all in jobs/configs."""
