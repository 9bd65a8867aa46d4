"""Options of ``python -m pipeline.doctor``, in addition to those of the training run."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from schemas.plan import TrainPlan


class DoctorConfig(TrainPlan):
    """The run that the cluster is examined for, with its own options: --store, --output, --workers
    N (or --workers.count N), --data.cache-dir, ..."""

    read_seconds: Annotated[float, Field(gt=0, le=3600)] = 3.0
    """Seconds for which all nodes read the store at the same time. Local files that were read
    before come from the memory of the system."""
    all_reduce_mb: Annotated[float, Field(gt=0, le=65536)] = 64.0
    """Size in 10^6 bytes of the sum over all nodes whose bandwidth is measured."""
    models: bool = True
    """Load teacher and autoencoder on every node, which downloads weights of a hub: those of the
    store's manifest, or without a store those of --extract.*."""
    timeout: Annotated[float, Field(gt=0)] = 120.0
    """Seconds after which a check counts as failed; loading models may take ten times as long."""
