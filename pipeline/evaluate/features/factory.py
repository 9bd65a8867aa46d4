"""The feature network that the options name."""

from __future__ import annotations

import torch

from pipeline.evaluate.features.base import Network
from pipeline.evaluate.features.timm_network import FeatureNetwork
from schemas.evaluate import EvaluateConfig, Resizing
from schemas.run import RunEvaluationConfig

NetworkOptions = EvaluateConfig | RunEvaluationConfig
"""Options with the fields that select a network: of an evaluation, and of a run."""


def open_network(
    options: NetworkOptions,
    *,
    device: torch.device | str,
    option: str = "--network",
    resizing: Resizing = "tensorflow",
) -> Network:
    """The network of FIDs: Inception with ``resizing``, unless ``options`` name another one. Raises
    ``UserError``."""
    if options.network is None:
        # other networks do not need torch-fidelity
        from pipeline.evaluate.features.inception import InceptionNetwork

        weights = options.inception_weights or "hub"
        return InceptionNetwork(weights, device=device, resizing=resizing)
    assert options.network_weights is not None
    return FeatureNetwork(
        options.network,
        options.network_weights,
        size=options.network_size,
        seed=options.seed,
        arguments=options.network_args,
        device=device,
        option=option,
    )
