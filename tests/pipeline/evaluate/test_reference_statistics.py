"""References that have both statistics and images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipeline.evaluate import evaluator as evaluation
from pipeline.evaluate.features.timm_network import FeatureNetwork
from pipeline.evaluate.reference_statistics import INCEPTION
from schemas.evaluate import EvaluateConfig
from tests.pipeline.evaluate.sets import blobs


def test_statistics_with_fewer_images_in_the_same_file_are_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in ADM's reference batches, which have Inception's statistics."""
    network = FeatureNetwork("test_resnet", "random", size=32)
    network.name = INCEPTION
    monkeypatch.setattr(evaluation, "open_network", lambda *_, **__: network)
    np.savez(
        tmp_path / "adm.npz",
        mu=np.full(network.width, 1e3),
        sigma=np.eye(network.width),
        arr_0=blobs(5, seed=1).permute(0, 2, 3, 1).numpy(),
    )
    np.savez(tmp_path / "samples.npz", arr_0=blobs(6, seed=0).permute(0, 2, 3, 1).numpy())
    asked = {"samples": tmp_path / "samples.npz", "reference": tmp_path / "adm.npz"}
    config = EvaluateConfig.model_validate({key: str(path) for key, path in asked.items()})
    found = evaluation.evaluate(config, "cpu")
    assert found is not None
    assert found.fid > 1e5 * network.width  # from the moments in the file
    assert found.recall is not None
    (line,) = (line for line in capsys.readouterr().err.splitlines() if "same file" in line)
    assert "more images than the 5 images in the same file; precision, recall and fd_dinov2" in line
