"""Bytes that a plan counts against bytes that an extraction writes."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from pipeline.cost_estimate.costs import TAR_BLOCK, latent_bytes, stored_bytes
from pipeline.cost_estimate.meta_models import build_meta_models
from pipeline.store.arrays import npy_member, stream_parts
from pipeline.targets.cuts import cut_columns, cut_values, encode_values
from pipeline.teachers import Teacher
from schemas.codecs import CodecSet
from schemas.extract import Cut, ExtractConfig, TeacherConfig

SMALL = ExtractConfig(
    teacher=TeacherConfig(model="vit_small_patch14_dinov2.lvd142m", weights="random")
)
CODEC_SETS: tuple[CodecSet, ...] = get_args(CodecSet)
CUTS: tuple[Cut, ...] = get_args(Cut)


@pytest.fixture(scope="module")
def crops() -> torch.Tensor:
    """Four of scikit-learn's two photographs, uint8 (4, 3, 256, 256)."""
    images = []
    for photograph in load_sample_images().images:
        image = Image.fromarray(photograph)
        for left in (0, 200):
            box = (left, 0, left + image.height, image.height)
            images.append(np.asarray(image.crop(box).resize((256, 256))))
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    return Teacher(SMALL.teacher, resolution=SMALL.resolution, layers=SMALL.layers)


@pytest.mark.parametrize("cut", CUTS)
def test_what_is_written_is_what_was_planned(
    cut: Cut, teacher: Teacher, crops: torch.Tensor
) -> None:
    geometry = build_meta_models(SMALL).geometry
    with torch.inference_mode():
        values = cut_values(cut, teacher, crops)
    for codec in CODEC_SETS:
        columns = cut_columns(cut, geometry, SMALL.resolution, codec)
        kept = encode_values(columns, values)
        written = 0
        for name, part in stream_parts(columns).items():
            for array in kept[name].numpy():
                blocks = 1 - -len(npy_member(part, array)) // TAR_BLOCK  # and a header's
                written += blocks * TAR_BLOCK
        planned = stored_bytes(cut, codec, geometry)
        exact = cut == "image" or codec in ("float16", "float32")
        tolerance = 0.001 if exact else 0.15 if codec == "bfloat16" else 0.1
        assert planned == pytest.approx(written / len(crops), rel=tolerance), (cut, codec)


def test_sizes_follow_from_the_geometry() -> None:
    g = build_meta_models(ExtractConfig()).geometry
    assert g.layers == (7, 8, 9, 10, 11)
    # the README's 8.3 MB
    features = stored_bytes("maps", "float16", g) - 5 * 12 * 256 * 256 * 2
    assert 256 * 768 * 2 < features < 256 * 768 * 2 + 8_000
    assert stored_bytes("maps", "faithful", g) == pytest.approx(3.80e6, rel=0.02)
    assert stored_bytes("qk", "faithful", g) == pytest.approx(1.85e6, rel=0.02)
    assert stored_bytes("activations", "faithful", g) == pytest.approx(0.174e6, rel=0.02)
    assert stored_bytes("image", "faithful", g) == pytest.approx(256 * 256 * 3, rel=0.01)
    assert latent_bytes(g) == pytest.approx(2 * 4 * 32 * 32 * 2, rel=0.2)


@pytest.mark.parametrize("cut", CUTS)
def test_every_size_is_a_whole_number_of_tar_blocks(cut: Cut) -> None:
    g = build_meta_models(SMALL).geometry
    for codec in CODEC_SETS:
        size = stored_bytes(cut, codec, g)
        assert isinstance(size, int)
        assert size % TAR_BLOCK == 0
        assert size <= stored_bytes(cut, codec, g, compress=False)
