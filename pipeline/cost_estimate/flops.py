"""FLOPs of one image through everything that a plan weighs; see ``pipeline.models.flops`` for what
counts."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from pipeline.cost_estimate.costs import Work
from pipeline.cost_estimate.meta_models import Drafts, Geometry, encode
from pipeline.models.flops import STEP, count, student_flops, tapped_flops
from pipeline.models.projector import Projector
from pipeline.teachers.vit import block_arguments, embed
from schemas.run import RunConfig


@dataclass(frozen=True)
class TeacherFlops:
    """One image through the teacher."""

    embed: int
    """Pixels to the tokens that enter block 0."""
    blocks: tuple[int, ...]
    logits: int
    """The attention logits of one tapped layer, all heads."""
    parameters: tuple[int, ...]
    """Weights of each block: a number, not FLOPs."""
    other_parameters: int

    def through(self, start: int, stop: int, taps: int) -> int:
        """Blocks ``start`` to ``stop - 1`` with the logits of ``taps`` layers; the embedding too
        where they begin at block 0."""
        blocks = sum(self.blocks[start:stop]) + taps * self.logits
        return blocks + (0 if start else self.embed)

    def weights(self, start: int = 0) -> int:
        """Weights of the blocks from ``start`` on; all others' too where that is block 0."""
        return sum(self.parameters[start:]) + (0 if start else self.other_parameters)


def teacher_flops(vit: Any, geometry: Geometry) -> TeacherFlops:
    """Of a model on the meta device."""
    size = vit.patch_embed.img_size
    pixels = torch.empty(1, 3, *size, device="meta")
    tokens, embedding = count(lambda: embed(vit, pixels))
    arguments = block_arguments(vit)
    blocks = []
    for block, extra in zip(vit.blocks, arguments, strict=True):
        tokens, flops = count(partial(block, tokens, **extra))
        blocks.append(flops)
    per_block = tuple(sum(p.numel() for p in block.parameters()) for block in vit.blocks)
    everything = sum(p.numel() for p in vit.parameters())
    return TeacherFlops(
        embed=embedding,
        blocks=tuple(blocks),
        logits=_logits(geometry, geometry.heads),
        parameters=per_block,
        other_parameters=everything - sum(per_block),
    )


def autoencoder_flops(autoencoder: Any, resolution: int) -> int:
    """Encoding one image."""
    pixels = torch.empty(1, 3, resolution, resolution, device="meta")
    return count(lambda: encode(autoencoder, pixels))[1]


def work(drafts: Drafts, run: RunConfig) -> Work:
    """Everything, for an extraction's networks and the run that reads its store."""
    geometry, alignment = drafts.geometry, run.alignment
    teacher = teacher_flops(drafts.vit, geometry)
    heads = min(run.student.size.heads, geometry.heads)
    depth, first, stored = geometry.depth, geometry.first_tapped, len(geometry.layers)
    tapped = len(set(alignment.teacher_layers)) if alignment.attention_weight else 0
    products = tapped * _logits(geometry, heads)
    whole = teacher.through(0, depth, stored)
    return Work(
        step=STEP * student_flops(run.student),
        alignment=STEP * _alignment(run, geometry, heads),
        autoencoder=autoencoder_flops(drafts.autoencoder, geometry.resolution),
        extraction={
            "maps": whole,
            "qk": teacher.through(0, depth, 0),
            "activations": teacher.through(0, first, 0),
            "image": 0,
        },
        training={
            "maps": 0,
            "qk": products,
            "activations": teacher.through(first, depth, tapped),
            "image": teacher.through(0, depth, tapped),
        },
        tail_weights={
            "maps": 0,
            "qk": 0,
            "activations": teacher.weights(first),
            "image": teacher.weights(),
        },
        tail_blocks={"maps": 0, "qk": 0, "activations": depth - first, "image": depth},
    )


def _alignment(run: RunConfig, geometry: Geometry, heads: int) -> int:
    """Forward FLOPs of projector and tapped logits."""
    alignment = run.alignment
    extra = 0
    if alignment.attention_weight:
        extra += len(alignment.student_layers) * tapped_flops(run.student, heads)
    if alignment.feature_weight:
        width = run.student.size.width
        with torch.device("meta"):
            projector = Projector(width, alignment.projector_width, geometry.width)
            # student tokens are resampled to the teacher's grid first
            features = torch.empty(1, geometry.patches, width)
        extra += count(lambda: projector(features))[1]
    return extra


def _logits(geometry: Geometry, heads: int) -> int:
    return 2 * heads * geometry.patches**2 * geometry.head_width
