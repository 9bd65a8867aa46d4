from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from pipeline.evaluate.features.timm_network import FeatureNetwork
from schemas.errors import UserError


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    """uint8 (6, 3, 32, 32)."""
    return torch.randint(
        0, 256, (6, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )


@pytest.fixture(scope="module")
def classifier() -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model("resnet18", num_classes=10).eval()


def test_weights_of_a_classifier_give_its_pooled_features(
    classifier: torch.nn.Module, images: torch.Tensor, tmp_path: Path
) -> None:
    path = tmp_path / "classifier.safetensors"
    save_file(classifier.state_dict(), path)
    network = FeatureNetwork("resnet18", str(path), size=32)
    assert network.width == 512
    mean, std = (torch.tensor(classifier.pretrained_cfg[k]).view(3, 1, 1) for k in ("mean", "std"))
    with torch.no_grad():
        pixels = (images / 255 - mean) / std
        expected = classifier.forward_head(classifier.forward_features(pixels), pre_logits=True)
    features = network.features(images)
    assert features.dtype == torch.float32
    torch.testing.assert_close(features, expected)


def test_random_weights_depend_on_the_seed_only(images: torch.Tensor) -> None:
    torch.manual_seed(1)
    one = FeatureNetwork("resnet18", "random", size=32, seed=3)
    torch.manual_seed(2)
    same = FeatureNetwork("resnet18", "random", size=32, seed=3)
    other = FeatureNetwork("resnet18", "random", size=32, seed=4)
    assert one.identity == same.identity != other.identity
    assert one.features(images).equal(same.features(images))
    assert one.features(images).std(0).mean() > 0.01


def test_a_transformer_takes_another_size_and_arguments(images: torch.Tensor) -> None:
    network = FeatureNetwork(
        "vit_tiny_patch16_224",
        "random",
        size=48,
        arguments={"depth": 2, "embed_dim": 24, "num_heads": 2, "patch_size": 8},
    )
    assert network.features(images).shape == (6, 24)
    assert network.identity["size"] == 48
    assert network.identity["arguments"]["depth"] == 2


def test_images_are_resized_as_pillow_does(images: torch.Tensor) -> None:
    """Larger images than the network's input are antialiased."""
    network = FeatureNetwork("resnet18", "random", size=16)
    assert network._interpolation.value == "bicubic"  # as in timm's configuration
    arrays = images.permute(0, 2, 3, 1).numpy()
    small = [
        np.asarray(Image.fromarray(a).resize((16, 16), Image.Resampling.BICUBIC)) for a in arrays
    ]
    expected = network.features(torch.from_numpy(np.stack(small)).permute(0, 3, 1, 2))
    torch.testing.assert_close(network.features(images), expected, rtol=1e-3, atol=2e-2)


def test_bad_networks_and_weights_are_named(tmp_path: Path, classifier: torch.nn.Module) -> None:
    with pytest.raises(UserError, match="--network 'resnet17'"):
        FeatureNetwork("resnet17", "random")
    with pytest.raises(UserError, match=r"--network-weights 'nowhere.pt': no such file"):
        FeatureNetwork("resnet18", "nowhere.pt")
    wrong = tmp_path / "wrong.pt"
    torch.save(classifier.state_dict(), wrong)
    with pytest.raises(UserError, match=r"--network-weights '.*wrong.pt' do not fit 'resnet34'"):
        FeatureNetwork("resnet34", str(wrong))
    state = {**classifier.state_dict(), "bn1.weight": torch.full((64,), torch.nan)}
    torch.save(state, wrong)
    with pytest.raises(
        UserError, match=r"wrong.pt': 64 of 64 numbers of bn1.weight are not finite"
    ):
        FeatureNetwork("resnet18", str(wrong))
    with pytest.raises(UserError, match=r"--dinov2 .* does not accept images of 32 pixels"):
        FeatureNetwork(
            "vit_tiny_patch16_224",
            "random",
            size=32,
            arguments={"img_size": 64, "depth": 1},
            option="--dinov2",
        )
