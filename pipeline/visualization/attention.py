"""Attention maps of teacher and student, next to each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
import torch
from torch import Tensor

from pipeline.diffusion.normalisation import normalisation_of, normalise
from pipeline.diffusion.objective import make_objective
from pipeline.models import MMDiT, Student, Taps
from pipeline.randomness import Purpose, generator
from pipeline.store import Store
from pipeline.targets.class_token import read_class_tokens
from pipeline.targets.sources import Wanted, aligned_heads, read_targets
from pipeline.visualization.store_sample import decode_latent, read_latents
from schemas.alignment import StreamAlignment
from schemas.diffusion import DiffusionConfig

matplotlib.use("Agg")
import matplotlib.pyplot as plt

NOISE_TIME = 0.2  # noise level of the latent that the student receives


def draw_attention(
    store: Store,
    students: Mapping[str, Student],
    alignment: StreamAlignment,
    rows: Sequence[int],
    path: Path,
    class_stream: str | None = None,
) -> None:
    """Write a picture file with one line per sample (``rows`` of shard 0): the image with the query
    token marked, then the query's attention, mean over heads, in the last aligned layer of the
    teacher and of each student. ``class_stream``: that of students with a class token, by default
    the teacher's."""
    teacher = store.manifest.teacher_stream(alignment.stream)[1].teacher
    grid = teacher.grid
    titles = ["image, query token", f"teacher,\nlayer {alignment.teacher_layers[-1]}"]
    titles += [f"{name},\nblock {alignment.student_layers[-1]}" for name in students]
    figure, axes = plt.subplots(
        len(rows), len(titles), figsize=(2.1 * len(titles), 2.1 * len(rows)), squeeze=False
    )
    heads = aligned_heads(next(iter(students.values())).config, teacher)
    request = Wanted(features=False, layers=alignment.teacher_layers[-1:], heads=heads)
    shards = np.zeros_like(rows)
    targets = read_targets(store, shards, np.asarray(rows), request, alignment.stream)
    assert targets.attention is not None
    tokens = None
    if any(student.config.class_token is not None for student in students.values()):
        name = class_stream or alignment.stream
        tokens = read_class_tokens(store, shards, np.asarray(rows), name)
    for line, row in enumerate(rows):
        sample = read_latents(store, 0, row)
        image = decode_latent(store, sample["mean"])
        query = _brightest_token(image, grid)
        maps = [targets.attention[line, 0, :, query].mean(0).reshape(grid)]
        for student in students.values():
            token = None if tokens is None else tokens[line]
            attention = student_attention(store, student, alignment, sample, heads, token)
            own_query = _same_place(query, grid, student.grid)
            maps.append(attention[own_query].reshape(student.grid))
        axes[line, 0].imshow(image)
        x = (query % grid[1] + 0.5) * image.shape[1] / grid[1]
        y = (query // grid[1] + 0.5) * image.shape[0] / grid[0]
        axes[line, 0].plot(x, y, "r+", markersize=10, mew=2)
        for axis, attention in zip(axes[line, 1:], maps, strict=True):
            axis.imshow(attention.numpy(), cmap="viridis")
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title, fontsize=9)
    for axis in axes.flat:
        axis.axis("off")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


@torch.no_grad()
def student_attention(
    store: Store,
    student: Student,
    alignment: StreamAlignment,
    sample: Mapping[str, np.ndarray],
    heads: int,
    class_token_E: Tensor | None = None,
) -> Tensor:
    """Attention of the last aligned block on a latent, and on the class token of a student that has
    one, at time ``NOISE_TIME`` of the student's own path, mean over the aligned heads: (N, N). An
    MMDiT gets no caption."""
    mean = torch.from_numpy(sample["mean"]).float().unsqueeze(0)
    latents = normalise(mean, normalisation_of(store.manifest.autoencoder))
    rng = generator(Purpose.SAMPLING, 0, 0)
    noise = torch.from_numpy(rng.standard_normal(latents.shape, dtype=np.float32))
    diffusion = DiffusionConfig(path=student.convention.path)
    objective = make_objective(student.config, diffusion)
    x_t, t, _ = objective.corrupt(latents, noise, torch.tensor([NOISE_TIME]))
    condition = torch.tensor([int(sample["label"])])
    if isinstance(student, MMDiT):
        condition = student.null_context.unsqueeze(0)
    given = {}
    if student.config.class_token is not None and class_token_E is not None:
        noise = torch.from_numpy(rng.standard_normal((1, len(class_token_E)), dtype=np.float32))
        given["class_token_BE"], _, _ = objective.corrupt(class_token_E.unsqueeze(0), noise, t)
    taps = Taps(attention_layers=(alignment.student_layers[-1],), heads=heads)
    logits = student(x_t, t, condition, taps, **given).attention_logits
    return torch.softmax(logits[0, 0], dim=-1).mean(0)


def _same_place(token: int, grid: tuple[int, int], other: tuple[int, int]) -> int:
    """Index of the token of another grid at the centre of a token of ``grid``."""
    row, column = divmod(token, grid[1])
    row = (2 * row + 1) * other[0] // (2 * grid[0])
    return row * other[1] + (2 * column + 1) * other[1] // (2 * grid[1])


def _brightest_token(image_RR3: np.ndarray, grid: tuple[int, int]) -> int:
    """Index of the token with the brightest patch: a part of the stroke on the demo's digits."""
    rows, columns = grid
    grey = image_RR3.astype(np.float32).mean(-1)
    height, width = grey.shape[0] // rows, grey.shape[1] // columns
    patches = grey[: rows * height, : columns * width].reshape(rows, height, columns, width)
    return int(patches.mean((1, 3)).argmax())
