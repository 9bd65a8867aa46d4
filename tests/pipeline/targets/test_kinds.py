"""Kinds of feature targets against a plain pass through the teacher's blocks; refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.alignment.losses import Targets, feature_loss
from pipeline.inspect.check import check_configs
from pipeline.inspect.fidelity import open_teacher
from pipeline.store import Store, StreamReader
from pipeline.targets.kinds import FLAT, spatially_normalised
from pipeline.targets.sources import Wanted, check_fit, read_targets, wanted_targets
from schemas.alignment import AlignmentConfig
from schemas.errors import UserError
from tests.encoded import SAMPLES, encode

CUTS = ("image", "activations", "maps", "qk")


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Store]:
    folder = tmp_path_factory.mktemp("kinds")
    return {cut: encode(folder / cut, cut=cut, codec="float32") for cut in CUTS}


@pytest.fixture(scope="module")
def blocks(stores: dict[str, Store]) -> list[Tensor]:
    """Output tokens of each block of the teacher, then those after its norm, without the prefix."""
    teacher = open_teacher(stores["image"], "image", None)
    rows = np.arange(SAMPLES)
    crops = StreamReader(stores["image"], "image").read(np.zeros_like(rows), rows)["crop"]
    with torch.no_grad():
        tokens = teacher.embed(teacher.preprocess(torch.from_numpy(crops).permute(0, 3, 1, 2)))
        outputs = []
        for block in teacher.vit.blocks:
            tokens = block(tokens)
            outputs.append(tokens)
        normed = [teacher.vit.norm(tokens) for tokens in outputs]
    return [tokens[:, teacher.prefix :] for tokens in (*outputs, *normed)]


def targets_of(store: Store, **options: Any) -> Targets:
    config = {"attention_weight": 0, "student_layers": (), "teacher_layers": (), **options}
    rows = np.arange(SAMPLES)
    wanted = wanted_targets(AlignmentConfig.model_validate(config), heads=2)
    return read_targets(store, np.zeros_like(rows), rows, wanted)


@pytest.mark.parametrize("cut", ["image", "activations"])
def test_kinds(stores: dict[str, Store], blocks: list[Tensor], cut: str) -> None:
    depth = len(blocks) // 2
    outputs, normed = blocks[:depth], blocks[depth:]
    expected = {
        "final": normed[-1],
        "unnormed": outputs[-1],
        "sum_of_layers": normed[depth - 3] + normed[depth - 1],
    }
    for kind, tokens in expected.items():
        layers = (depth - 3, depth - 1) if kind == "sum_of_layers" else None
        found = targets_of(stores[cut], target=kind, target_layers=layers)
        torch.testing.assert_close(found.features, tokens, rtol=2e-5, atol=2e-5)


def test_a_sum_of_layers_and_attention_are_read_in_one_pass(stores: dict[str, Store]) -> None:
    rows = np.arange(SAMPLES)
    store, depth = stores["activations"], 6
    both = Wanted(True, (5, 3), 6, "sum_of_layers", (3,))
    found = read_targets(store, np.zeros_like(rows), rows, both)
    attention = read_targets(store, np.zeros_like(rows), rows, Wanted(False, (5, 3), 6)).attention
    assert torch.equal(found.attention, attention)
    alone = targets_of(store, target="sum_of_layers", target_layers=(3,))
    assert torch.equal(found.features, alone.features)
    assert store.manifest.teacher_stream()[1].teacher.depth == depth


@pytest.mark.parametrize("cut", CUTS)
def test_normalised_targets_of_every_cut(stores: dict[str, Store], cut: str) -> None:
    plain = targets_of(stores[cut]).features
    assert plain is not None
    found = targets_of(stores[cut], normalisation="spatial", normalisation_strength=0.7).features
    x = plain.double().numpy()
    expected = (x - 0.7 * x.mean(1, keepdims=True)) / (x.std(1, ddof=1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=1e-4)


def test_a_constant_channel_decides_no_cosine() -> None:
    """With the authors' formula it would be 0.4 * 0.5 / 1e-6 and all cosines +1 or -1."""
    torch.manual_seed(0)
    features, student = torch.randn(2, 16, 8), torch.randn(2, 16, 9)
    flat = torch.full((2, 16, 1), 0.5)
    flat[0, 3] += 0.5 * FLAT  # rounding: float16 numbers that differ in the last bit
    target = spatially_normalised(torch.cat([features, flat], -1), 0.6)
    assert (target[..., -1] == 0).all()
    expected = feature_loss(torch.cat([student[..., :8], student[..., 8:]], -1), target)
    without = spatially_normalised(features, 0.6)
    cosine = (student[..., :8] * without).sum(-1) / (student.norm(dim=-1) * without.norm(dim=-1))
    torch.testing.assert_close(expected, -cosine.mean(1))
    still = spatially_normalised(flat + torch.randn(2, 16, 1) * 10 * FLAT, 0.6)
    assert (still != 0).all()  # a small deviation is a deviation


@pytest.mark.parametrize(
    ("cut", "options", "complaint"),
    [
        ("maps", {"target": "unnormed"}, r"target unnormed: stream 'maps' of cut 'maps' .*--cut"),
        ("qk", {"target": "sum_of_layers", "target_layers": [5]}, r"cut 'qk'"),
        (
            "activations",
            {"target": "sum_of_layers", "target_layers": [1, 5]},
            r"layer 1; .* 2 to 5",
        ),
        ("image", {"target": "sum_of_layers", "target_layers": [6]}, r"layer 6; .* 0 to 5"),
    ],
)
def test_a_cut_that_cannot_give_a_kind_is_refused(
    stores: dict[str, Store],
    tmp_path: Path,
    cut: str,
    options: dict[str, Any],
    complaint: str,
) -> None:
    alignment = {"attention_weight": 0, "student_layers": [], "teacher_layers": [], **options}
    with pytest.raises(UserError, match=complaint) as error:
        check_fit(AlignmentConfig.model_validate(alignment), stores[cut].manifest)
    assert "\n" not in str(error.value)
    file = tmp_path / "run.yaml"
    student = "{model: SiT-S/1, latent_size: 8, depth: 9}"
    file.write_text(f"student: {student}\nalignment: {alignment}\n")
    (answer,) = check_configs(stores[cut], (str(file),))
    assert not answer.ok
    if cut in ("maps", "qk"):
        assert answer.reason is not None
        assert answer.command is not None
        assert "--cut activations --layers" in answer.command


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"projector": "conv"}, "projector conv needs projector_kernel"),
        ({"projector_kernel": 3}, "projector_kernel is for projector conv, not for mlp"),
        ({"projector": "conv", "projector_kernel": 2}, "projector_kernel"),
        ({"normalisation": "spatial"}, "normalisation spatial needs normalisation_strength"),
        ({"normalisation_strength": 0.5}, "is for normalisation spatial, not for none"),
        ({"normalisation": "spatial", "normalisation_strength": 1.5}, "less than or equal to 1"),
        ({"target": "sum_of_layers"}, "target sum_of_layers needs target_layers"),
        ({"target_layers": [3]}, "target_layers is for target sum_of_layers"),
        ({"target": "sum_of_layers", "target_layers": []}, "name each layer once"),
    ],
)
def test_options_that_do_not_go_together(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        AlignmentConfig.model_validate(options)
