"""FLOPs against published and measured numbers."""

from __future__ import annotations

import pytest
import torch

from pipeline.cost_estimate.flops import autoencoder_flops, image_flops, teacher_flops
from pipeline.cost_estimate.meta_models import build_meta_models
from pipeline.models import Taps, make_student
from pipeline.models.flops import STEP, count, student_flops, tapped_flops
from schemas.errors import UserError
from schemas.extract import ExtractConfig, TeacherConfig
from schemas.run import RunConfig
from schemas.student import StudentConfig

DINOV2 = ExtractConfig()
DINOV3_7B = ExtractConfig(teacher=TeacherConfig(model="vit_7b_patch16_dinov3.lvd1689m"))
GIGA = 1e9


@pytest.mark.parametrize(
    ("model", "gmac"),  # table 1 of arXiv 2212.09748 and its repository's names
    [("SiT-XL/2", 118.64), ("SiT-L/2", 80.71), ("SiT-B/2", 23.01), ("DiT-XL/2", 118.64)],
)
def test_students(model: str, gmac: float) -> None:
    assert student_flops(StudentConfig(model=model)) == pytest.approx(2 * gmac * GIGA, rel=0.03)


def test_students_block_by_block() -> None:
    config = StudentConfig(model="SiT-S/4", depth=5)
    taps = Taps(attention_layers=(1, 3), heads=4)
    with torch.device("meta"):
        student = make_student(config)
        inputs = torch.empty(1, 4, 32, 32), torch.empty(1), torch.zeros(1, dtype=torch.long)
    assert student_flops(config) == count(lambda: student(*inputs))[1]
    tapped = count(lambda: student(*inputs, taps).attention_logits)[1]
    assert tapped == student_flops(config) + 2 * tapped_flops(config, heads=4)


def test_dinov2_base() -> None:
    models = build_meta_models(DINOV2)
    flops = teacher_flops(models.vit, models.geometry)
    # 12 D^2 multiply-adds per token and block, 2 T^2 D for attention, and the patches
    T, D, N = 257, 768, 256
    block = 2 * (12 * T * D * D + 2 * T * T * D)
    assert flops.blocks == (block,) * 12
    assert flops.embed == 2 * N * 3 * 14 * 14 * D
    assert flops.logits == 2 * 12 * N * N * 64
    assert flops.through(0, 12, 0) == pytest.approx(2 * 23.2 * GIGA, rel=0.03)
    assert flops.weights() == sum(p.numel() for p in models.vit.parameters())
    assert flops.weights(7) == 5 * sum(p.numel() for p in models.vit.blocks[0].parameters())


def test_dinov3_7b_takes_no_memory() -> None:
    models = build_meta_models(DINOV3_7B)
    flops = teacher_flops(models.vit, models.geometry)
    assert all(p.is_meta for p in models.vit.parameters())
    assert flops.weights() == pytest.approx(6.716e9, rel=0.001)
    # as a rule of thumb two FLOPs per weight and token, and attention on top
    assert flops.through(0, 40, 0) == pytest.approx(2 * 6.716e9 * 261, rel=0.03)
    geometry = models.geometry
    assert (geometry.tokens, geometry.patches, geometry.heads) == (261, 256, 32)
    assert (geometry.width, geometry.head_width, geometry.depth) == (4096, 128, 40)


def test_the_teacher_is_split_without_loss() -> None:
    models = build_meta_models(DINOV2)
    run = RunConfig()
    total = image_flops(models, run)
    flops = teacher_flops(models.vit, models.geometry)
    assert total.step == STEP * student_flops(run.student)
    front, tail = total.extraction["activations"], total.training["activations"]
    assert front + tail == total.training["image"]
    assert front == flops.embed + sum(flops.blocks[:7])
    assert total.extraction["image"] == total.training["maps"] == 0
    # the design's numbers: about 6.5% of an SiT-XL/2 step, 2-3% for the last five blocks
    assert total.training["image"] / total.step == pytest.approx(0.065, abs=0.002)
    assert total.training["activations"] / total.step == pytest.approx(0.027, abs=0.002)


def test_alignment_extras() -> None:
    total = image_flops(build_meta_models(DINOV2), RunConfig())
    projector = 2 * 256 * (1152 * 2048 + 2048 * 2048 + 2048 * 768)
    logits = 2 * 4 * 12 * 256 * 256 * 72
    assert total.alignment == STEP * (projector + logits)


def test_autoencoder_needs_no_hub() -> None:
    models = build_meta_models(DINOV2)
    assert models.geometry.latent_shape == (4, 32, 32)
    assert models.notes == ()
    assert autoencoder_flops(models.autoencoder, 256) == pytest.approx(272.7 * GIGA, rel=0.03)
    assert build_meta_models(DINOV2.model_copy(update={"autoencoder": "someone/else"})).notes


def test_a_layer_that_the_teacher_lacks() -> None:
    with pytest.raises(UserError, match="12 layers, 0 to 11"):
        build_meta_models(DINOV2.model_copy(update={"layers": (12,)}))
