"""Issue 3, parity 4: DINOv2 from the official key format, from the uint8 crop to every target."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from pipeline.teachers import Teacher
from schemas.extract import TeacherConfig
from tests.parity.reference import ULPS, Golden, check_close, check_number, entropy, probes

PLAIN = "dinov2_io"


def io_file(variant: str) -> str:
    return f"dinov2_{variant}_io" if variant else PLAIN


def official_state(golden: Golden, variant: str) -> dict[str, Tensor]:
    """The plain model's state, with the extra parameters of a variant."""
    state = golden.tensors("dinov2_state")
    extra = f"variant_{variant}."
    return {
        name.removeprefix(extra): tensor
        for name, tensor in state.items()
        if name.startswith(extra) or not name.startswith("variant_")
    }


@pytest.fixture
def teacher(golden: Golden, teacher_variant: str, tmp_path_factory: Any) -> Teacher:
    """Our teacher, its weights from a .pth file as DINOv2's authors publish them."""
    sizes = golden.configs["dinov2"]
    state = official_state(golden, teacher_variant)
    registers = state.get("register_tokens")
    model, arguments = "vit_base_patch14_dinov2.lvd142m", {}
    if registers is not None:
        model = "vit_base_patch14_reg4_dinov2.lvd142m"
        arguments = {"reg_tokens": registers.shape[1]}
    path = tmp_path_factory.mktemp("teacher") / "dinov2.pth"
    torch.save(state, path)
    config = TeacherConfig(
        model=model,
        weights=str(path),
        model_args={
            **arguments,
            "patch_size": sizes["patch_size"],
            "embed_dim": sizes["embed_dim"],
            "depth": sizes["depth"],
            "num_heads": sizes["num_heads"],
            "mlp_ratio": sizes["mlp_ratio"],
        },
    )
    resolution = golden.configs["crop"]["resolution"]
    return Teacher(config, resolution=resolution, layers=sizes["attention_layers"])


@pytest.fixture
def crops(golden: Golden) -> Tensor:
    """uint8 (B, 3, R, R)."""
    paths = [golden.image(name) for name in golden.configs["dinov2"]["input_images"]]
    pixels = np.stack([np.asarray(Image.open(path).convert("RGB")) for path in paths])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2)


@pytest.fixture
def with_registers(teacher: Teacher) -> Teacher:
    """The same teacher counting only the class token as a prefix, as the reference does: its
    targets keep R register tokens before the N patches, logits are (R + N) x (R + N)."""
    teacher.prefix = 1
    return teacher


def check_logits(golden: Golden, file: str, logits_BLHNN: Tensor, taken: list[int]) -> None:
    """All that is recorded of the logits of the tapped layers number ``taken``."""
    io = golden.tensors(file)
    first = logits_BLHNN[0]
    found = {
        "attn_logits_rows_image0": first[:, :, io["attn_rows"]],
        "attn_probes_image0": probes(first, io["attn_probe_vectors"]),
        "attn_logsumexp": logits_BLHNN.logsumexp(-1),
        "attn_entropy": entropy(logits_BLHNN),
    }
    for name, actual in found.items():
        expected = io[name]
        if name.endswith("_image0"):
            expected = expected[taken]
        else:  # over all images; `logits` may be of the first alone
            expected = expected[: len(logits_BLHNN), taken]
        check_close(f"{file}: {name}", actual, expected, golden.tolerance(file, name))


def test_position_embedding_is_resampled(golden: Golden, teacher: Teacher) -> None:
    recorded = golden.tensors(PLAIN)["pos_embed_resampled"]
    table, cls_token = teacher.vit.pos_embed, teacher.vit.cls_token
    if table.shape != recorded.shape:
        # timm adds the class token's position to the class token of models with registers
        first = golden.tensors("dinov2_state")["cls_token"] + recorded[:, :1]
        check_close("class token", cls_token, first, ULPS * first.abs().max().item())
        recorded = recorded[:, 1:]
    tolerance = golden.tolerance(PLAIN, "pos_embed_resampled")
    check_close("position table", table, recorded, tolerance)


def test_preprocessing(golden: Golden, teacher: Teacher, crops: Tensor) -> None:
    io = golden.tensors(PLAIN)
    pixels = teacher.preprocess(crops)
    top, bottom = io["preprocessed_topleft"], io["preprocessed_bottomright"]
    golden.check(PLAIN, "preprocessed_topleft", pixels[..., : top.shape[-2], : top.shape[-1]])
    # no noise of its own is recorded; the other corner's is that of bicubic weights in float32
    corner = pixels[..., -bottom.shape[-2] :, -bottom.shape[-1] :]
    tolerance = golden.tolerance(PLAIN, "preprocessed_topleft")
    check_close("preprocessed_bottomright", corner, bottom, tolerance)
    sums = golden.readme["checks"]["dinov2"]["preprocessed_sum_l2_per_image_channel"]
    for image, channels in zip(pixels.double(), sums, strict=True):
        for channel, (_, norm) in zip(image, channels, strict=True):
            check_number("norm of a channel", channel.norm(), norm)


def test_targets_from_the_crop(
    golden: Golden, teacher: Teacher, teacher_variant: str, crops: Tensor
) -> None:
    file = io_file(teacher_variant)
    with torch.no_grad():
        targets = teacher(crops)
        teacher.prefix = 1  # see with_registers
        reference = teacher(crops)
    golden.check(file, "x_norm_patchtokens", targets.features)
    golden.check(file, "x_norm_clstoken", targets.class_token)
    check_logits(golden, file, reference.attention_logits, list(range(len(teacher.layers))))
    # ours: the last N rows and columns of the reference's
    patches = targets.features.shape[1]
    logits = reference.attention_logits[..., -patches:, -patches:]
    assert torch.equal(targets.attention_logits, logits)
    registers = reference.features[:, :-patches]
    if teacher_variant:
        golden.check(file, "x_norm_regtokens", registers)


def test_tokens_that_enter_the_blocks(
    golden: Golden, teacher: Teacher, teacher_variant: str, crops: Tensor
) -> None:
    file = io_file(teacher_variant)
    names = [name for name in golden.tensors(file) if name.startswith("hidden_entering_block")]
    assert names
    with torch.no_grad():
        embedded = teacher.embed(teacher.preprocess(crops[:1]))
        for name in names:
            block = int(re.search(r"block(\d+)", name)[1])
            golden.check(file, name, teacher.run_blocks(embedded, stop=block)[0])


def test_targets_from_the_tokens_that_enter_a_block(
    golden: Golden, with_registers: Teacher, teacher_variant: str
) -> None:
    """What a cut before that block gives; needs no image."""
    file, teacher = io_file(teacher_variant), with_registers
    io = golden.tensors(file)
    names = [name for name in io if name.startswith("hidden_entering_block")]
    assert names
    for name in names:
        start = int(re.search(r"block(\d+)", name)[1])
        taken = [i for i, layer in enumerate(teacher.layers) if layer >= start]
        with torch.no_grad():
            tokens, logits = teacher.run_blocks(io[name], start=start)
            tokens = teacher.vit.norm(tokens)
        assert list(logits) == [teacher.layers[i] for i in taken]
        check_logits(golden, file, torch.stack(list(logits.values()), dim=1), taken)
        patches = io["x_norm_patchtokens"][:1]
        tolerance = golden.tolerance(file, "x_norm_patchtokens")
        check_close("patch tokens", tokens[:, -patches.shape[1] :], patches, tolerance)
        check_close("class token", tokens[:, 0], io["x_norm_clstoken"][:1], tolerance)
