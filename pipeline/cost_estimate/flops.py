"""FLOPs per image of teacher, autoencoder and student, counted as in ``pipeline.models.flops``."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from pipeline.cost_estimate.costs import ImageFlops
from pipeline.cost_estimate.meta_models import Geometry, MetaModels, encode
from pipeline.models.flops import STEP, count, logits_flops, student_flops, tapped_flops
from pipeline.models.projector import make_projector
from pipeline.teachers.vit import block_arguments, embed
from schemas.run import RunConfig


@dataclass(frozen=True)
class TeacherFlops:
    """FLOPs of one image in the parts of the teacher."""

    embed: int  # pixels to the input tokens of block 0
    blocks: tuple[int, ...]
    logits: int  # attention logits of one tapped layer, all heads
    parameters: tuple[int, ...]  # number of weights of each block
    other_parameters: int

    def through(self, start: int, stop: int, taps: int) -> int:
        """FLOPs of blocks ``start`` to ``stop - 1`` and of the logits of ``taps`` layers, with the
        embedding if ``start`` is 0."""
        return sum(self.blocks[start:stop]) + taps * self.logits + (0 if start else self.embed)

    def weights(self, start: int = 0) -> int:
        """Number of weights of the blocks from ``start``, of the whole model if it is 0."""
        return sum(self.parameters[start:]) + (0 if start else self.other_parameters)


def teacher_flops(vit: Any, geometry: Geometry) -> TeacherFlops:
    """Counts for a timm model on the meta device."""
    pixels = torch.empty(1, 3, *vit.patch_embed.img_size, device="meta")
    tokens, embedding = count(lambda: embed(vit, pixels))
    blocks = [
        count(partial(block, tokens, **extra))[1]
        for block, extra in zip(vit.blocks, block_arguments(vit), strict=True)
    ]
    per_block = tuple(sum(p.numel() for p in block.parameters()) for block in vit.blocks)
    return TeacherFlops(
        embedding,
        tuple(blocks),
        logits_flops(geometry.heads, geometry.patches, geometry.head_width),
        per_block,
        sum(p.numel() for p in vit.parameters()) - sum(per_block),
    )


def autoencoder_flops(autoencoder: Any, resolution: int) -> int:
    """FLOPs to encode one image."""
    pixels = torch.empty(1, 3, resolution, resolution, device="meta")
    return count(lambda: encode(autoencoder, pixels))[1]


def image_flops(models: MetaModels, run: RunConfig, *, class_token: bool = False) -> ImageFlops:
    """FLOPs of an extraction's networks and of the run that reads its store. With
    ``class_token`` the extraction runs all blocks of the teacher for every cut."""
    geometry = models.geometry
    teacher = teacher_flops(models.vit, geometry)
    heads = min(run.student.size.heads, geometry.heads)
    depth, first = geometry.depth, geometry.layers[0]
    streams = run.alignment.streams
    tapped = len({layer for s in streams if s.attention_weight for layer in s.teacher_layers})
    return ImageFlops(
        step=STEP * student_flops(run.student),
        alignment=STEP * _alignment(run, geometry, heads),
        autoencoder=autoencoder_flops(models.autoencoder, geometry.resolution),
        extraction={
            "maps": teacher.through(0, depth, len(geometry.layers)),
            "qk": teacher.through(0, depth, 0),
            "activations": teacher.through(0, depth if class_token else first, 0),
            "image": teacher.through(0, depth, 0) if class_token else 0,
        },
        training={
            "maps": 0,
            "qk": tapped * logits_flops(heads, geometry.patches, geometry.head_width),
            "activations": teacher.through(first, depth, tapped),
            "image": teacher.through(0, depth, tapped),
        },
        tail_weights={"activations": teacher.weights(first), "image": teacher.weights()},
    )


def _alignment(run: RunConfig, geometry: Geometry, heads: int) -> int:
    """Forward FLOPs of projectors and tapped logits."""
    total = 0
    for options in run.alignment.streams:
        if options.attention_weight:
            total += len(options.student_layers) * tapped_flops(run.student, heads)
        if options.feature_weight:
            width = run.student.size.width
            with torch.device("meta"):
                projector = make_projector(options, width, geometry.width, geometry.grid)
                # student tokens are resampled to the teacher's grid before the projector
                tokens = geometry.patches + (run.student.class_token is not None)
                features = torch.empty(1, tokens, width)
            total += count(partial(projector, features))[1]
    return total
