"""The Inception network with random weights, against torch-fidelity."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch_fidelity import calculate_metrics
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from pipeline.evaluate.features.inception import GRID, SPATIAL_CHANNELS, InceptionNetwork
from pipeline.evaluate.inception_score import InceptionScore
from pipeline.evaluate.measure import measure
from pipeline.evaluate.metrics import RESIZINGS, compare
from pipeline.evaluate.precision_recall import precision_recall
from schemas.errors import UserError
from tests.pipeline.evaluate.sets import ArrayImages, blobs

COUNT = 6


class _Unloaded(FeatureExtractorInceptionV3):
    def load_state_dict(self, *args: object, **kwargs: object) -> None:  # type: ignore[override]
        """The weights are made below."""


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    nothing = io.BytesIO()
    torch.save({}, nothing)
    nothing.seek(0)
    model = _Unloaded("random", ["2048"], feature_extractor_weights_path=nothing)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                std = (2 / parameter[0].numel()) ** 0.5
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(model.state_dict(), path)
    return path


OPTIONS: dict[str, Any] = {"option": "--samples", "batch_size": 4, "max_features": 100}


def _torch_fidelity(weights: Path, sets: list[torch.Tensor], **metrics: Any) -> dict[str, float]:
    return calculate_metrics(
        input1=_Plain(sets[0]),
        input2=_Plain(sets[1]),
        feature_extractor="inception-v3-compat",
        feature_extractor_weights_path=str(weights),
        cuda=False,
        verbose=False,
        cache=False,
        save_cpu_ram=True,
        batch_size=6,
        **metrics,
    )


def test_scores_and_neighbours_are_torch_fidelitys(weights: Path) -> None:
    network = InceptionNetwork(str(weights))
    sets = [blobs(COUNT, seed=0), blobs(COUNT, seed=1, mean=110)]
    samples, reference = (measure(ArrayImages(s), network, None, **OPTIONS) for s in sets)
    assert samples.features is not None
    assert reference.features is not None
    assert samples.features.shape == (COUNT, network.width)
    expected = _torch_fidelity(weights, sets, isc=True, isc_splits=2, prc=True, prc_neighborhood=2)
    logits = network.extract(sets[0]).logits
    assert logits is not None
    score = InceptionScore(COUNT, splits=2)
    score.add(logits)
    assert score.score() == pytest.approx(expected["inception_score_mean"], rel=1e-6)
    assert score.score() > 1 + 1e-5
    assert samples.inception_score == pytest.approx(1)  # one image in each split
    found = precision_recall(samples.features, reference.features, 2)
    assert found == pytest.approx((expected["precision"], expected["recall"]))


@pytest.mark.slow
def test_distances_are_torch_fidelitys(weights: Path) -> None:
    """Slow, because torch-fidelity computes the eigenvalues of a 2048 x 2048 product."""
    network = InceptionNetwork(str(weights))
    sets = [blobs(COUNT, seed=0), blobs(COUNT, seed=1, mean=110)]
    samples, reference = (measure(ArrayImages(s), network, None, **OPTIONS) for s in sets)
    found = compare(samples, reference, network)
    expected = _torch_fidelity(weights, sets, fid=True)
    assert found.fid == pytest.approx(expected["frechet_inception_distance"], rel=1e-4)
    assert found.sfid is not None
    assert found.sfid > 0


def test_spatial_features_are_the_first_channels_in_tensorflows_order(weights: Path) -> None:
    """The block's output starts with its first branch."""
    network = InceptionNetwork(str(weights))
    seen = []
    network._model.Mixed_6d.register_forward_hook(lambda m, i, output: seen.append(output))
    spatial = network.extract(blobs(1, seed=2)).spatial
    assert spatial is not None
    assert spatial.shape == (1, SPATIAL_CHANNELS * GRID * GRID)
    places = spatial.reshape(17, 17, 7)
    assert places.std() > 0
    for channel in range(7):
        torch.testing.assert_close(places[..., channel], seen[0][0, channel])


def test_pytorchs_resizing_is_that_of_pytorch_fid(
    weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """pytorch-fid resizes images in [0, 1] and maps them to [-1, 1]; torch-fidelity's port
    subtracts 128 from what its own resizing returns, and divides by 128."""
    images = blobs(2, seed=3)
    found = InceptionNetwork(str(weights), resizing="pytorch").extract(images)
    usual = InceptionNetwork(str(weights)).extract(images)
    module = "torch_fidelity.feature_extractor_inceptionv3"

    def resized(x: torch.Tensor, size: tuple[int, int], align_corners: bool) -> torch.Tensor:
        x = torch.nn.functional.interpolate(x / 255, size, mode="bilinear", align_corners=False)
        return (2 * x - 1) * 128 + 128

    monkeypatch.setattr(f"{module}.interpolate_bilinear_2d_like_tensorflow1x", resized)
    expected = InceptionNetwork(str(weights)).extract(images)
    for one, other, plain in zip(found, expected, usual, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
        assert (one - plain).abs().max() > 1e-3
    identities = [InceptionNetwork(str(weights), resizing=r).identity for r in RESIZINGS]
    assert identities[0] != identities[1]


def test_other_weights_are_refused_with_the_url(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no such file; download https://.*--network ID"):
        InceptionNetwork(str(tmp_path / "nowhere.pth"))
    other = tmp_path / "other.pth"
    torch.save({"fc.weight": torch.zeros(3)}, other)
    with pytest.raises(UserError, match=r"other.pth' are not weights of the Inception network"):
        InceptionNetwork(str(other))


def test_weights_that_cannot_be_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*args: object, **kwargs: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
    with pytest.raises(
        UserError, match=r"not in torch's cache .*no route.*--inception-weights FILE"
    ):
        InceptionNetwork("hub")


class _Plain(torch.utils.data.Dataset[torch.Tensor]):
    def __init__(self, images: torch.Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.images[index]
