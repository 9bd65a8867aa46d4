"""Which network decodes latents, and what it makes of their factors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from pipeline.assets import DEMO_AUTOENCODER
from pipeline.autoencoders import Autoencoder, decode_means, open_decoder
from schemas.errors import UserError
from schemas.networks import AutoencoderInfo


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the demo's autoencoder, to be changed."""
    return Path(shutil.copytree(DEMO_AUTOENCODER, tmp_path / "vae"))


@pytest.fixture
def encoder(folder: Path) -> AutoencoderInfo:
    return Autoencoder(str(folder)).info(64)


def change(folder: Path, **values: float) -> None:
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | values))


def test_the_encoder_decodes(encoder: AutoencoderInfo) -> None:
    decoder = open_decoder(None, encoder)
    assert (decoder.name, decoder.weights_sha256) == (encoder.name, encoder.weights_sha256)


def test_another_network_under_the_name_of_the_encoder_is_refused(
    encoder: AutoencoderInfo, folder: Path
) -> None:
    other = encoder.model_copy(update={"weights_sha256": "5" * 64})
    with pytest.raises(UserError, match=r"is not the one .* SHA-256 .* not 555.*--autoencoder$"):
        open_decoder(None, other)
    with pytest.raises(UserError, match=r"restore the original$"):
        open_decoder(None, other, option=None)
    change(folder, scaling_factor=2 * encoder.scaling_factor)
    with pytest.raises(UserError, match=r"its scaling_factor is"):
        open_decoder(None, encoder)


def test_a_named_decoder_is_not_compared_with_the_encoder(encoder: AutoencoderInfo) -> None:
    other = encoder.model_copy(update={"name": "elsewhere", "weights_sha256": "5" * 64})
    assert open_decoder("demo", other).name == "demo"


def test_weights_of_latents_from_a_data_set_are_unknown(encoder: AutoencoderInfo) -> None:
    assert open_decoder(None, encoder.model_copy(update={"weights_sha256": None}))


def test_means_are_scaled_by_the_encoder_and_unscaled_by_the_decoder(
    encoder: AutoencoderInfo, folder: Path
) -> None:
    """TAESD, for example, decodes scaled latents without unscaling."""
    mean = torch.randn(2, *encoder.latent_shape, generator=torch.Generator().manual_seed(0))
    expected = open_decoder(None, encoder).decode(mean * encoder.scaling_factor)
    change(folder, scaling_factor=1.0)
    unscaling = open_decoder(str(folder), encoder)
    images = decode_means(unscaling, encoder, mean / encoder.scaling_factor)
    assert torch.equal(images, unscaling.decode(mean))
    change(folder, scaling_factor=encoder.scaling_factor)
    assert torch.equal(decode_means(open_decoder(None, encoder), encoder, mean), expected)


def test_latents_of_another_shape_are_refused(encoder: AutoencoderInfo) -> None:
    with pytest.raises(UserError, match=r"cannot decode latents of shape \(3, 8, 8\)"):
        decode_means(open_decoder(None, encoder), encoder, torch.zeros(1, 3, 8, 8))
