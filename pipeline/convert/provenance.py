"""Provenance of a converted stream, as its manifest records it."""

from __future__ import annotations

import importlib.metadata

import torch

from pipeline.convert.streams import StreamPlan
from schemas.extract import Format
from schemas.store import ComputeInfo, LatentsStream, Origin, TeacherStream

VERSIONED = ("torch", "timm", "numpy", "numcodecs")


def computed_stream(
    plan: StreamPlan, device: torch.device, format: Format
) -> LatentsStream | TeacherStream:
    """The stream after a conversion on this machine, without its tail.

    Copied arrays keep the compute info of the source; only their bytes are packed again. Computed
    ones get that of this process, with the precision and batch size of the source (training replays
    a tail with the precision of the blocks before it), and the source stream is recorded.
    """
    before, after = plan.before, plan.after
    if not plan.computes:
        compute = _with_packers(before.compute, before.compute.versions, format)
        return after.model_copy(update={"compute": compute})
    assert isinstance(before, TeacherStream)
    versions = {name: importlib.metadata.version(name) for name in VERSIONED}
    versions["torch"] = torch.__version__  # with the build: last bits depend on the CUDA version
    here = before.compute.model_copy(
        update={
            "device": "cuda" if device.type == "cuda" else "cpu",
            "threads": 0 if device.type == "cuda" else 1,  # threads of the arithmetic of one batch
        }
    )
    origin = Origin(
        cut=before.cut,
        layers=before.teacher.layers,
        codecs={name: column.codec for name, column in before.columns.items()},
        compute=before.compute,
    )
    return after.model_copy(
        update={
            "compute": _with_packers(here, versions, format),
            "converted_from": (*before.converted_from, origin),
        }
    )


def _with_packers(compute: ComputeInfo, versions: dict[str, str], format: Format) -> ComputeInfo:
    """With the versions of the libraries that pack arrays into bytes."""
    versions = {name: version for name, version in versions.items() if name != "zarr"}
    if "numcodecs" in versions:
        versions["numcodecs"] = importlib.metadata.version("numcodecs")
    if format == "zarr":
        versions["zarr"] = importlib.metadata.version("zarr")
    return compute.model_copy(update={"versions": versions})
