"""Kernels of a compiled step are machine code for sm_90, made without a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from pipeline.alignment.fused_attention_loss import rows_gradient, rows_loss
from pipeline.models.layers import FinalLayer
from pipeline.models.projector import Projector
from pipeline.models.sit import Block
from pipeline.teachers.vit import create_meta_vit
from schemas.extract import ExtractConfig
from tests.gpu.fake_gpu import CUDA
from tests.gpu.inductor import Graph, assemble, fake_h100, functional, lower, missing

REASON = missing()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(REASON is not None, reason=str(REASON)),
]
SAMPLES, TOKENS, TAPPED = 32, 256, 12


def check(graphs: list[Graph], folder: Path, kinds: list[str]) -> None:
    assert [graph.kind for graph in graphs] == kinds
    for graph in graphs:
        sizes = assemble(graph, folder)
        assert sizes
        assert len(sizes) == len(graph.kernels)
        assert all(size > 1000 for size in sizes.values()), sizes


@pytest.mark.parametrize(("width", "heads"), [(768, 12), (1152, 16)], ids=["B", "XL"])
@pytest.mark.parametrize("part", ["block", "tapped block", "final layer", "projector"])
def test_a_part_of_the_student(part: str, width: int, heads: int, tmp_path: Path) -> None:
    modules: dict[str, nn.Module] = {
        "final layer": FinalLayer(width, 2, 4),
        "projector": Projector(width, 2048, 768),
    }
    module = modules.get(part) or Block(width, heads)
    if part == "tapped block":
        module.tapped_heads = TAPPED
    with fake_h100():
        module.to(CUDA)
        x = torch.empty(SAMPLES, TOKENS, width, device=CUDA, requires_grad=True)
        c = torch.empty(SAMPLES, width, device=CUDA, dtype=torch.bfloat16, requires_grad=True)
        inputs = [x] if part == "projector" else [x, c]
        with torch.autocast("cuda", torch.bfloat16):
            graphs = lower(functional(module, len(inputs)), [*inputs, *module.parameters()])
        check(graphs, tmp_path, ["forward", "backward"])


def test_a_block_of_the_teacher(tmp_path: Path) -> None:
    teacher = ExtractConfig().teacher
    vit, _ = create_meta_vit(teacher, ExtractConfig().resolution)
    tokens = vit.patch_embed.num_patches + vit.num_prefix_tokens
    with fake_h100(), torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        block = vit.blocks[-1].to_empty(device=CUDA)
        x = torch.empty(SAMPLES, tokens, vit.embed_dim, device=CUDA)
        graphs = lower(functional(block, 1), [x, *block.parameters()])
        check(graphs, tmp_path, ["inference"])


def test_the_attention_loss_and_its_gradient(tmp_path: Path) -> None:
    with fake_h100(), torch.no_grad():
        q, k = (
            torch.empty(SAMPLES, TAPPED, TOKENS, 72, device=CUDA, dtype=torch.bfloat16)
            for _ in range(2)
        )
        maps = torch.empty(SAMPLES, TAPPED, TOKENS, TOKENS, device=CUDA)
        rows = torch.empty(SAMPLES, TAPPED, TOKENS, device=CUDA)
        grad = torch.empty(SAMPLES, device=CUDA)
        check(lower(rows_loss, [q, k, maps]), tmp_path, ["inference"])
        check(lower(rows_gradient, [q, k, maps, rows, grad]), tmp_path, ["inference"])
