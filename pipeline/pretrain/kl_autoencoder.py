"""Training of a tiny KL autoencoder in the format of diffusers.

The autoencoder of latent diffusion (arXiv 2112.10752), made small: an L1 reconstruction loss and a
small weight on the divergence of the posterior from a standard normal. There is no adversarial
loss, because digits have no texture. 32x32x3 images become 8x8x4 latents.
"""

from __future__ import annotations

import math

import torch
from diffusers import AutoencoderKL
from pydantic import BaseModel
from torch import Tensor
from torch.nn import functional as F

from pipeline.pretrain.common import Updater, autocast, check_weights, copied_batches
from pipeline.pretrain.options import AutoencoderConfig


class AutoencoderReport(BaseModel):
    """Measurements of a trained autoencoder."""

    psnr_db: float
    """PSNR of decoded samples of the posteriors of held-out images."""
    scaling_factor: float
    channel_std: list[float]
    """Standard deviation of each channel of the scaled latents of all images."""


def create_autoencoder(config: AutoencoderConfig, resolution: int) -> AutoencoderKL:
    blocks = len(config.widths)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        block_out_channels=config.widths,
        layers_per_block=1,
        latent_channels=config.latent_channels,
        norm_num_groups=config.norm_groups,
        sample_size=resolution,
    )


def train_autoencoder(
    images: Tensor, config: AutoencoderConfig, device: torch.device | str = "cpu"
) -> tuple[AutoencoderKL, AutoencoderReport]:
    """Train on uint8 ``images`` (N, 3, R, R); returns the model on the CPU, its scaling factor set,
    and its measurements."""
    torch.manual_seed(config.seed)
    order = torch.randperm(len(images))
    held_out = order[: max(1, round(config.held_out * len(images)))]
    training = order[len(held_out) :]

    model = create_autoencoder(config, images.shape[-1]).to(
        device, memory_format=torch.channels_last
    )
    updater = Updater("autoencoder", model.parameters(), config, clip=1.0, betas=(0.9, 0.95))
    batches = copied_batches({"images": images[training]}, config.batch_size, device)
    model.train()
    for step in range(config.steps):
        pixels = to_pixels(next(batches)["images"])
        with autocast(device):  # which computes exponentials, squares and losses in float32
            posterior = model.encode(pixels).latent_dist
            decoded = model.decode(posterior.sample()).sample
            reconstruction = F.l1_loss(decoded, pixels)
            # diffusers sums the divergence over an image; the mean does not depend on the grid size
            divergence = posterior.kl().mean() / posterior.mean[0].numel()
        updater.update(step, reconstruction + config.kl_weight * divergence)
    model.eval().to(memory_format=torch.contiguous_format)
    check_weights(model)
    equalise_channels(model, images)
    report = measure(model, images, held_out)
    return model.cpu(), report


def to_pixels(images: Tensor) -> Tensor:
    """uint8 (B, 3, R, R) to float32 in [-1, 1]."""
    return (images.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


@torch.inference_mode()
def encode(model: AutoencoderKL, images: Tensor) -> tuple[Tensor, Tensor]:
    """Posterior mean and std, each (N, C, h, w), unscaled, on the CPU."""
    means, stds = [], []
    for batch in images.split(256):
        posterior = model.encode(to_pixels(batch.to(model.device))).latent_dist
        means.append(posterior.mean.cpu())
        stds.append(posterior.std.cpu())
    return torch.cat(means), torch.cat(stds)


@torch.no_grad()
def equalise_channels(model: AutoencoderKL, images: Tensor) -> None:
    """Give every latent channel mean 0 and the same std, without changing one decoded pixel.

    A store has one scaling factor for all channels, so channels of unequal std would stay unequal
    in the diffusion model. The affine map that equalises them is folded into the 1x1 convolutions
    on both sides of the latent.
    """
    mean, std = encode(model, images)
    shift = mean.mean((0, 2, 3))
    spread = (mean.var((0, 2, 3)) + std.square().mean((0, 2, 3))).sqrt()
    gain = spread / spread.log().mean().exp()  # the geometric mean keeps the overall scale
    before, after = model.quant_conv, model.post_quant_conv
    channels = len(shift)
    shift, gain = shift.to(model.device), gain.to(model.device)
    before.weight[:channels] /= gain[:, None, None, None]
    before.bias[:channels] = (before.bias[:channels] - shift) / gain
    before.bias[channels:] -= 2 * gain.log()  # the second half of the outputs are log variances
    after.bias += after.weight[:, :, 0, 0] @ shift
    after.weight *= gain[None, :, None, None]


@torch.inference_mode()
def measure(model: AutoencoderKL, images: Tensor, held_out: Tensor) -> AutoencoderReport:
    """Measure the model and set its scaling factor to 1 / std of the sampled latents."""
    mean, std = encode(model, images)
    latents = mean + std * torch.randn_like(mean)
    scale = 1 / latents.std().item()
    model.register_to_config(scaling_factor=round(scale, 5))

    squares, expected = 0.0, images[held_out]
    for z, pixels in zip(latents[held_out].split(256), expected.split(256), strict=True):
        decoded = model.decode(z.to(model.device)).sample.cpu()
        rounded = ((decoded.clamp(-1, 1) + 1) * 127.5).round()
        squares += (rounded - pixels.float()).square().sum().item()
    return AutoencoderReport(
        psnr_db=10 * math.log10(255**2 * expected.numel() / squares),
        scaling_factor=model.config.scaling_factor,
        channel_std=(scale * latents).std((0, 2, 3)).tolist(),
    )
