"""Train a tiny KL autoencoder, in the format of diffusers, for the demo.

    python jobs/pretrain/autoencoder.py [--steps N] [--out DIRECTORY]

It is the autoencoder of latent diffusion (arXiv 2112.10752) made small: an L1 reconstruction loss,
a slight pull of the posterior towards a standard normal, and no adversary, because digits have no
texture to invent. 32x32x3 images become 8x8x4 latents.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import torch
from diffusers import AutoencoderKL
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parents[2]
if not __package__:  # run as a file: Python then looks beside this file, not in the repository root
    sys.path.insert(0, str(ROOT))

from pipeline.datasets.digits import digits_images


class AutoencoderConfig(BaseModel):
    """What is trained and how. Every width after the first halves the resolution."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    widths: tuple[int, ...] = (16, 32, 32)
    norm_groups: Annotated[int, Field(gt=0)] = 8
    latent_channels: Annotated[int, Field(gt=0)] = 4
    steps: Annotated[int, Field(gt=0)] = 1500
    batch_size: Annotated[int, Field(gt=0)] = 64
    learning_rate: Annotated[float, Field(gt=0)] = 2e-3
    warmup_steps: Annotated[int, Field(gt=0)] = 50
    kl_weight: Annotated[float, Field(ge=0, description="per latent value; L1 is per pixel")] = 1e-4
    held_out: Annotated[float, Field(gt=0, lt=1, description="fraction never trained on")] = 0.1
    seed: int = 0


class AutoencoderReport(BaseModel):
    """What was measured, on held-out images except for the statistics of all latents."""

    psnr_db: float
    noisy_psnr_db: float = Field(description="after noise of a tenth of the latents' std")
    scaling_factor: float
    channel_mean: list[float] = Field(description="of the scaled latents")
    channel_std: list[float] = Field(description="of the scaled latents")
    posterior_std: float = Field(description="mean, in scaled units")
    neighbour_correlation: float = Field(description="of scaled latents one position apart")
    encode_images_per_second: float


def build(config: AutoencoderConfig, resolution: int) -> AutoencoderKL:
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
    """Train on uint8 ``images`` (N, 3, R, R); the returned model, on the CPU, knows its scaling
    factor."""
    torch.manual_seed(config.seed)
    order = torch.randperm(len(images))
    held_out = order[: max(1, round(config.held_out * len(images)))]
    training = order[len(held_out) :]

    model = build(config, images.shape[-1]).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.learning_rate, betas=(0.9, 0.95), weight_decay=0.0
    )
    batches = shuffled_batches(training, config.batch_size)
    model.train()
    for step in range(config.steps):
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * schedule(step, config)
        pixels = to_pixels(images[next(batches)].to(device))
        posterior = model.encode(pixels).latent_dist
        decoded = model.decode(posterior.sample()).sample
        reconstruction = F.l1_loss(decoded, pixels)
        # diffusers sums the divergence over an image; per value it does not depend on the grid.
        divergence = posterior.kl().mean() / posterior.mean[0].numel()
        loss = reconstruction + config.kl_weight * divergence
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0 or step == config.steps - 1:
            print(
                f"step {step:5d}  L1 {reconstruction.item():.4f}  KL {divergence.item():.2f}",
                flush=True,
            )
    model.eval().to(memory_format=torch.contiguous_format)
    equalise_channels(model, images)
    report = measure(model, images, held_out)
    return model.cpu(), report


def shuffled_batches(indices: Tensor, size: int) -> Iterator[Tensor]:
    """Endless index batches: a new permutation each epoch, the ragged end dropped."""
    size = min(size, len(indices))
    while True:
        epoch = indices[torch.randperm(len(indices))]
        yield from epoch[: len(epoch) // size * size].split(size)


def schedule(step: int, config: AutoencoderConfig) -> float:
    """Linear warm-up, then a half cosine to zero."""
    warmup = min(1.0, (step + 1) / config.warmup_steps)
    return warmup * 0.5 * (1 + math.cos(math.pi * step / config.steps))


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

    A store has one scaling factor for all channels, so that channels of unequal std would reach the
    diffusion model unequal. The affine map that evens them out folds into the 1x1 convolutions on
    either side of the latent.
    """
    mean, std = encode(model, images)
    shift = mean.mean((0, 2, 3))
    spread = (mean.var((0, 2, 3)) + std.square().mean((0, 2, 3))).sqrt()
    gain = spread / spread.log().mean().exp()  # the geometric mean keeps the overall scale
    into, out_of = model.quant_conv, model.post_quant_conv
    channels = len(shift)
    shift, gain = shift.to(model.device), gain.to(model.device)
    into.weight[:channels] /= gain[:, None, None, None]
    into.bias[:channels] = (into.bias[:channels] - shift) / gain
    into.bias[channels:] -= 2 * gain.log()  # the other half of the outputs are log variances
    out_of.bias += out_of.weight[:, :, 0, 0] @ shift
    out_of.weight *= gain[None, :, None, None]


@torch.inference_mode()
def measure(model: AutoencoderKL, images: Tensor, held_out: Tensor) -> AutoencoderReport:
    """Measure the model, and set its scaling factor to 1 / std of the sampled latents."""
    start = time.perf_counter()
    mean, std = encode(model, images)
    seconds = time.perf_counter() - start
    latents = mean + std * torch.randn_like(mean)
    scale = 1 / latents.std().item()
    model.register_to_config(scaling_factor=round(scale, 5))

    def psnr(z: Tensor) -> float:
        squares = 0.0
        for latents, expected in zip(z.split(256), images[held_out].split(256), strict=True):
            decoded = model.decode(latents.to(model.device)).sample.cpu()
            rounded = ((decoded.clamp(-1, 1) + 1) * 127.5).round()
            squares += (rounded - expected.float()).square().sum().item()
        return 10 * math.log10(255**2 * images[held_out].numel() / squares)

    scaled = latents * scale
    centred = scaled - scaled.mean((0, 2, 3), keepdim=True)
    neighbours = (centred[..., 1:] * centred[..., :-1]).mean() / centred.square().mean()
    return AutoencoderReport(
        psnr_db=psnr(latents[held_out]),
        noisy_psnr_db=psnr(latents[held_out] + 0.1 / scale * torch.randn_like(mean[held_out])),
        scaling_factor=model.config.scaling_factor,
        channel_mean=scaled.mean((0, 2, 3)).tolist(),
        channel_std=scaled.std((0, 2, 3)).tolist(),
        posterior_std=std.mean().item() * scale,
        neighbour_correlation=neighbours.item(),
        encode_images_per_second=len(images) / seconds,
    )


def main() -> None:
    defaults = AutoencoderConfig()
    parser = argparse.ArgumentParser(description="Train the demo's autoencoder on the digits.")
    parser.add_argument("--out", type=Path, default=ROOT / "pipeline/assets/demo/autoencoder")
    parser.add_argument("--resolution", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=defaults.steps)
    parser.add_argument("--batch-size", type=int, default=defaults.batch_size)
    parser.add_argument("--learning-rate", type=float, default=defaults.learning_rate)
    parser.add_argument("--kl-weight", type=float, default=defaults.kl_weight)
    parser.add_argument("--seed", type=int, default=defaults.seed)
    options = vars(parser.parse_args())
    out, resolution = options.pop("out"), options.pop("resolution")
    torch.set_num_threads(options.pop("threads"))

    digits, _ = digits_images(resolution)
    images = torch.from_numpy(digits).permute(0, 3, 1, 2)
    start = time.perf_counter()
    model, report = train_autoencoder(images, AutoencoderConfig(**options))
    model.save_pretrained(out)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters:,} parameters, {time.perf_counter() - start:.0f} s, saved to {out}")
    print(report.model_dump_json(indent=2))


if __name__ == "__main__":
    main()
