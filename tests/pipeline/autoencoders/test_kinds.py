"""Every class of diffusers' autoencoders: normalised as by the library's pipelines, or refused."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from pipeline.autoencoders import Autoencoder, decode_means, open_decoder
from pipeline.autoencoders.autoencoder import KINDS
from pipeline.diffusion.normalisation import normalise
from schemas.errors import UserError

BLOCKS = {
    "block_out_channels": (8, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 4,
}
STATISTICS = {"latents_mean": [-1.5, 2.0, -1.25, 2.5], "latents_std": [8.5, 6.0, 6.5, 5.25]}
FILM = {"base_dim": 8, "z_dim": 4, "dim_mult": [1, 2], "num_res_blocks": 1}
SMALL: dict[str, tuple[str, dict[str, Any]]] = {
    "sdxl": ("AutoencoderKL", {**BLOCKS, **STATISTICS, "scaling_factor": 0.5}),
    "flux": ("AutoencoderKL", {**BLOCKS, "scaling_factor": 0.3611, "shift_factor": 0.1159}),
    "sd": ("AutoencoderKL", {**BLOCKS, "scaling_factor": 0.18215}),
    "taesd": (
        "AutoencoderTiny",
        {
            "encoder_block_out_channels": (8, 8),
            "decoder_block_out_channels": (8, 8),
            "num_encoder_blocks": (1, 1),
            "num_decoder_blocks": (1, 1),
            "scaling_factor": 0.7,
            "shift_factor": 0.2,
        },
    ),
    "inpainting": (
        "AsymmetricAutoencoderKL",
        {
            "down_block_types": BLOCKS["down_block_types"],
            "up_block_types": BLOCKS["up_block_types"],
            "down_block_out_channels": (8, 16),
            "up_block_out_channels": (8, 16),
            "norm_num_groups": 4,
        },
    ),
    "dc": (
        "AutoencoderDC",
        {
            "latent_channels": 8,
            "attention_head_dim": 2,
            "encoder_block_types": ("ResBlock", "ResBlock"),
            "decoder_block_types": ("ResBlock", "ResBlock"),
            "encoder_block_out_channels": (8, 8),
            "decoder_block_out_channels": (8, 8),
            "encoder_layers_per_block": (1, 1),
            "decoder_layers_per_block": (1, 1),
            "encoder_qkv_multiscales": ((), ()),
            "decoder_qkv_multiscales": ((), ()),
            "scaling_factor": 0.41407,
        },
    ),
    "flux2": ("AutoencoderKLFlux2", {**BLOCKS, "latent_channels": 4}),
    "hunyuan": (
        "AutoencoderKLHunyuanImage",
        {
            "in_channels": 3,
            "out_channels": 3,
            "latent_channels": 8,
            "block_out_channels": (32, 32),
            "layers_per_block": 1,
            "spatial_compression_ratio": 2,
            "sample_size": 32,
            "scaling_factor": 0.75289,
        },
    ),
    "qwen": ("AutoencoderKLQwenImage", {**FILM, "temperal_downsample": [False], **STATISTICS}),
    "wan": ("AutoencoderKLWan", {**FILM, "temperal_downsample": [False], **STATISTICS}),
    "vq": (
        "VQModel",
        {**BLOCKS, "latent_channels": 3, "num_vq_embeddings": 16, "scaling_factor": 0.18215},
    ),
}


def make(name: str, folder: Path, **changes: Any) -> Any:
    """A small random model of the library, saved to ``folder``."""
    torch.manual_seed(0)
    kind, options = SMALL[name]
    model = getattr(diffusers, kind)(**{**options, **changes}).eval()
    if kind == "AutoencoderKLFlux2":
        model.bn.running_mean.normal_(0, 2)
        model.bn.running_var.uniform_(0.5, 4)
    model.save_pretrained(folder)
    return model


def patches(latents: Tensor) -> Tensor:
    """Four neighbours as channels 4c to 4c + 3, row by row (Flux2Pipeline._patchify_latents)."""
    parts = [latents[:, :, row::2, column::2] for row in (0, 1) for column in (0, 1)]
    return torch.stack(parts, 2).flatten(1, 2)


def library_encodes(model: Any, pixels: Tensor) -> Tensor:
    """Latents of the library's own pipelines, from the most probable z."""
    config, kind = model.config, type(model).__name__
    if kind in {"AutoencoderKLQwenImage", "AutoencoderKLWan"}:  # QwenImageImg2ImgPipeline
        z = model.encode(pixels.unsqueeze(2)).latent_dist.mode()
        mean = torch.tensor(config.latents_mean).view(1, -1, 1, 1, 1)
        return ((z - mean) * (1.0 / torch.tensor(config.latents_std).view(1, -1, 1, 1, 1)))[:, :, 0]
    if kind == "AutoencoderKLFlux2":
        z = patches(model.encode(pixels).latent_dist.mode())
        mean = model.bn.running_mean.view(1, -1, 1, 1)
        return (z - mean) / torch.sqrt(model.bn.running_var.view(1, -1, 1, 1) + 1e-4)
    encoded = model.encode(pixels)
    if kind == "AutoencoderDC":
        return encoded.latent * config.scaling_factor
    if kind == "VQModel":
        return encoded.latents * config.scaling_factor
    if kind == "AutoencoderTiny":
        return (encoded.latents - config.shift_factor) * config.scaling_factor
    z = encoded.latent_dist.mode()
    if getattr(config, "latents_mean", None) is not None:  # StableDiffusionXLImg2ImgPipeline
        mean = torch.tensor(config.latents_mean).view(1, 4, 1, 1)
        return (
            (z - mean) * config.scaling_factor / torch.tensor(config.latents_std).view(1, 4, 1, 1)
        )
    return (z - (getattr(config, "shift_factor", None) or 0)) * config.scaling_factor


def library_decodes(model: Any, latents: Tensor) -> Tensor:
    """Pixels from -1 to 1 of the library's own pipelines."""
    config, kind = model.config, type(model).__name__
    if kind in {"AutoencoderKLQwenImage", "AutoencoderKLWan"}:
        std = 1.0 / torch.tensor(config.latents_std).view(1, -1, 1, 1, 1)
        z = latents.unsqueeze(2) / std + torch.tensor(config.latents_mean).view(1, -1, 1, 1, 1)
        return model.decode(z, return_dict=False)[0][:, :, 0]
    if kind == "AutoencoderKLFlux2":
        std = torch.sqrt(model.bn.running_var.view(1, -1, 1, 1) + 1e-4)
        latents = latents * std + model.bn.running_mean.view(1, -1, 1, 1)
        z = torch.empty(len(latents), latents.shape[1] // 4, *(2 * n for n in latents.shape[2:]))
        for channel, row, column in product(range(z.shape[1]), (0, 1), (0, 1)):
            z[:, channel, row::2, column::2] = latents[:, 4 * channel + 2 * row + column]
    elif getattr(config, "latents_mean", None) is not None:
        std = torch.tensor(config.latents_std).view(1, 4, 1, 1)
        mean = torch.tensor(config.latents_mean).view(1, 4, 1, 1)
        z = latents * std / config.scaling_factor + mean
    else:
        z = latents / config.scaling_factor + (getattr(config, "shift_factor", None) or 0)
    return model.decode(z, return_dict=False)[0]


@pytest.mark.parametrize("name", SMALL)
@torch.no_grad()
def test_latents_are_those_of_the_librarys_pipelines(name: str, tmp_path: Path) -> None:
    model = make(name, tmp_path)
    images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    vae = Autoencoder(str(tmp_path))
    info = vae.info(16)
    assert info.kind == SMALL[name][0]
    mean, std = vae.encode(images)
    assert mean.shape[1:] == info.latent_shape == std.shape[1:]
    latents = normalise(mean, vae.normalisation)
    expected = library_encodes(model, images / 127.5 - 1)
    torch.testing.assert_close(latents, expected, rtol=1e-4, atol=1e-5)
    # the same numbers from the manifest, whose JSON is read again
    info = type(info).model_validate_json(info.model_dump_json())
    decoder = open_decoder(None, info)
    pixels = ((library_decodes(model, expected) + 1) * 127.5).clamp(0, 255)
    assert pixels.std() > 1
    for decoded in (decoder.decode(latents), decode_means(decoder, info, mean)):
        assert (decoded - pixels).abs().max() < 1.01  # truncated, not rounded


def test_every_supported_class_is_tested() -> None:
    assert {kind for kind, _ in SMALL.values()} == set(KINDS)


@torch.no_grad()
def test_the_spread_of_a_posterior_is_scaled_and_not_shifted(tmp_path: Path) -> None:
    """Training samples mean + std * noise before it normalises."""
    model = make("sdxl", tmp_path)
    images = torch.randint(0, 256, (1, 3, 16, 16), dtype=torch.uint8)
    vae = Autoencoder(str(tmp_path))
    mean, std = vae.encode(images)
    noise = torch.randn_like(mean)
    posterior = model.encode(images / 127.5 - 1).latent_dist
    z = posterior.mean + posterior.std * noise
    shape = (1, 4, 1, 1)
    expected = (z - torch.tensor(STATISTICS["latents_mean"]).view(shape)) * 0.5
    expected = expected / torch.tensor(STATISTICS["latents_std"]).view(shape)
    found = normalise(mean + std * noise, vae.normalisation)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_patches_of_latents_have_spreads(tmp_path: Path) -> None:
    model = make("flux2", tmp_path)
    images = torch.randint(0, 256, (1, 3, 16, 16), dtype=torch.uint8)
    _, std = Autoencoder(str(tmp_path)).encode(images)
    expected = model.encode(images / 127.5 - 1).latent_dist.std
    torch.testing.assert_close(std, patches(expected))


def test_another_normalisation_under_the_name_of_the_encoder_is_refused(tmp_path: Path) -> None:
    make("sdxl", tmp_path)
    info = Autoencoder(str(tmp_path)).info(16)
    config = json.loads((tmp_path / "config.json").read_text())
    config["latents_mean"][2] = 0.0
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"its latents_mean is -1\.5,2\.0,0\.0,2\.5, not"):
        open_decoder(None, info)


def edited(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda config: config.update(changes)


@pytest.mark.parametrize(
    ("name", "edit", "reason"),
    [
        ("sdxl", edited(latents_std=None), "only one of latents_mean and latents_std"),
        ("sdxl", edited(latents_mean=[1.0, 2.0]), r"latents_mean has 2 numbers; expected 4"),
        ("sdxl", edited(latents_std=[1.0, 2.0, 0.0, 1.0]), "latents_std .* not above 0"),
        ("sdxl", edited(latents_mean=["a"] * 4), "latents_mean is not a list of numbers"),
        ("sdxl", edited(shift_factor=0.5), "both latents_mean and shift_factor"),
        ("sd", edited(scaling_factor=None), "neither scaling_factor nor latents_mean"),
        ("sd", edited(scaling_factor=0.0), "scaling_factor is 0"),
        ("taesd", edited(latents_mean=[0.0] * 4), "has latents_mean, which this version's"),
        ("dc", edited(shift_factor=0.5), "has shift_factor, which this version's AutoencoderDC"),
        ("sd", edited(_class_name="ConsistencyDecoderVAE"), "a ConsistencyDecoderVAE.*noise"),
        ("sd", edited(_class_name="AutoencoderRAE"), "a AutoencoderRAE.*normalises"),
        ("sd", edited(_class_name="AutoencoderKLLTXVideo"), "a AutoencoderKLLTXVideo.*not one of"),
        ("sd", edited(_class_name="AutoencoderOobleck"), "a AutoencoderOobleck.*not one of images"),
    ],
)
def test_what_is_not_known_is_refused(
    name: str, edit: Callable[[dict[str, Any]], None], reason: str, tmp_path: Path
) -> None:
    make(name, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    edit(config)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=f"^--autoencoder '{tmp_path}'.*{reason}"):
        Autoencoder(str(tmp_path))


def test_every_other_class_of_the_library_is_refused_by_name(tmp_path: Path) -> None:
    make("sd", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    names = [n for n in dir(diffusers) if n.startswith(("Autoencoder", "Asym", "VQ", "Consist"))]
    assert len(names) > 15
    for kind in set(names) - set(KINDS):
        (tmp_path / "config.json").write_text(json.dumps({**config, "_class_name": kind}))
        with pytest.raises(UserError, match=f"is a {kind}, which is not supported: "):
            Autoencoder(str(tmp_path))


def test_only_the_libraries_own_attribute_is_ignored_in_silence(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """AutoencoderTiny writes block_out_channels into its config and warns when it reads it."""
    make("taesd", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert "block_out_channels" in config
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)
    Autoencoder(str(tmp_path))
    assert "will be ignored" not in caplog.text
    (tmp_path / "config.json").write_text(json.dumps({**config, "tiles": 3}))
    Autoencoder(str(tmp_path))
    assert "'tiles': 3" in caplog.text
    caplog.clear()
    diffusers.AutoencoderTiny.from_pretrained(tmp_path)
    assert "block_out_channels" in caplog.text  # the filter is not left behind
