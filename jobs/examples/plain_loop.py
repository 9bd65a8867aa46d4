"""A training loop of another style on a store: plain PyTorch, a model of one's own, REPA's loss.

    python jobs/examples/plain_loop.py runs/cats/store
    torchrun --nproc-per-node 2 jobs/examples/plain_loop.py runs/cats/store --epochs 4

The lines with ``store`` or ``batches`` are all that the loop needs of this project: the teacher's
features and attention come with each batch, and no teacher is run.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if not __package__:  # run as a file: Python then searches this folder, not the repository root
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    import jobs  # noqa: F401  (reports packages that are not installed)

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline import open_store


class Denoiser(nn.Module):
    """A small transformer that predicts the velocity of latents, and the teacher's features from
    the tokens between its two halves."""

    def __init__(self, channels: int, size: int, classes: int, teacher_width: int, tokens: int):
        super().__init__()
        width, patch = 64, max(1, size // round(tokens**0.5))
        self.patchify = nn.Conv2d(channels, width, patch, patch)
        self.place = nn.Parameter(torch.randn(1, (size // patch) ** 2, width) * 0.02)
        self.condition = nn.Embedding(classes, width)
        self.time = nn.Sequential(nn.Linear(1, width), nn.SiLU(), nn.Linear(width, width))
        halves = [nn.TransformerEncoderLayer(width, 4, 2 * width, batch_first=True) for _ in "ab"]
        self.first, self.second = halves
        self.project = nn.Linear(width, teacher_width)
        self.unpatchify = nn.ConvTranspose2d(width, channels, patch, patch)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Velocity (B, C, h, w) and projected tokens (B, N, D)."""
        grid = self.patchify(x)
        tokens = grid.flatten(2).mT + self.place
        tokens = tokens + (self.condition(y) + self.time(t[:, None]))[:, None]
        middle = self.first(tokens)
        out = self.second(middle).mT.unflatten(2, grid.shape[2:])
        return self.unpatchify(out), self.project(middle)


def main(argv: list[str]) -> list[float]:
    """Train; returns the mean loss of each epoch."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("store")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=32, help="samples of each process")
    parser.add_argument("--no-shuffle", action="store_true")
    options = parser.parse_args(argv)
    distributed = torch.distributed.is_torchelastic_launched()
    if distributed:
        torch.distributed.init_process_group("gloo")
    torch.manual_seed(0)

    store = open_store(options.store)
    batches = store.batches(options.batch_size, shuffle=not options.no_shuffle)
    _, tokens, teacher_width = store.targets([0]).features.shape
    channels, size, _ = store.latent_shape
    model: nn.Module = Denoiser(channels, size, store.num_classes, teacher_width, tokens)
    if distributed:
        model = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    means = []
    for epoch in range(options.epochs):
        batches.set_epoch(epoch)
        losses = []
        for batch in batches:
            noise, t = torch.randn_like(batch.latents), torch.rand(len(batch.latents))
            mixed = (1 - t)[:, None, None, None] * batch.latents + t[:, None, None, None] * noise
            velocity, projected = model(mixed, t, batch.labels)
            loss = F.mse_loss(velocity, noise - batch.latents)
            loss = loss - 0.5 * F.cosine_similarity(projected, batch.features, dim=-1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        means.append(sum(losses) / len(losses))
        if not distributed or torch.distributed.get_rank() == 0:
            print(f"epoch {epoch}: loss {means[-1]:.3f} over {len(losses)} batches")
    if distributed:
        torch.distributed.destroy_process_group()
    return means


if __name__ == "__main__":
    main(sys.argv[1:])
