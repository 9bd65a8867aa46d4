"""Every family of teachers, small and with random weights, against timm's own forward pass."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import timm
import timm.layers
import torch
from torch import Tensor, nn

from pipeline.teachers import Teacher
from pipeline.teachers.attention_tap import AttentionOperands, AttentionTap
from pipeline.teachers.vit import _NoInitialisation, block_arguments
from schemas.errors import UserError
from schemas.extract import TeacherConfig

SMALL = {"embed_dim": 48, "depth": 3, "num_heads": 4}
IMAGENET, CLIP, HALF = (0.485, 0.456, 0.406), (0.48145466, 0.4578275, 0.40821073), (0.5, 0.5, 0.5)


class Family(NamedTuple):
    model: str
    prefix: int
    """Class and register tokens."""
    patch: int = 16
    mean: tuple[float, float, float] = IMAGENET
    qk_norm: bool = False


FAMILIES = [
    Family("vit_small_patch14_dinov2.lvd142m", 1, patch=14),
    Family("vit_base_patch14_dinov2.lvd142m", 1, patch=14),
    Family("vit_large_patch14_dinov2.lvd142m", 1, patch=14),
    Family("vit_giant_patch14_dinov2.lvd142m", 1, patch=14),  # gated MLP
    Family("vit_small_patch14_reg4_dinov2.lvd142m", 5, patch=14),
    Family("vit_base_patch14_reg4_dinov2.lvd142m", 5, patch=14),
    Family("vit_large_patch14_reg4_dinov2.lvd142m", 5, patch=14),
    Family("vit_giant_patch14_reg4_dinov2.lvd142m", 5, patch=14),
    Family("vit_small_patch16_dinov3.lvd1689m", 5),  # rotary position embedding
    Family("vit_base_patch16_dinov3_qkvb.lvd1689m", 5),
    Family("vit_huge_plus_patch16_dinov3.lvd1689m", 5),  # and gated MLP
    Family("vit_base_patch16_clip_224.openai", 1, mean=CLIP),  # norm before the blocks
    Family("vit_base_patch16_clip_quickgelu_224.openai", 1, mean=CLIP),
    Family("vit_base_patch16_224.mae", 1),
    Family("vit_base_patch16_siglip_224.webli", 0, mean=HALF),  # no class token
    Family("vit_medium_patch16_gap_240.sw_in12k", 0, mean=HALF),  # norm after the pooling
    Family("eva02_small_patch14_224.mim_in22k", 1, patch=14, mean=CLIP),
    Family("vit_base_patch16_rope_mixed_224.naver_in1k", 1),  # learnt, different in each block
    Family("vit_small_patch16_224", 1, mean=HALF, qk_norm=True),
]


def make_teacher(family: Family, layers: tuple[int, ...] = (0, 2), **config: Any) -> Teacher:
    args = {**SMALL, "qk_norm": True} if family.qk_norm else SMALL
    config = {"weights": "random", "model_args": args, **config}
    return Teacher(TeacherConfig(model=family.model, **config), resolution=64, layers=layers)


@pytest.fixture(params=FAMILIES, ids=lambda family: family.model)
def family(request: pytest.FixtureRequest) -> Family:
    return request.param


@pytest.fixture
def images() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8, generator=generator)


def block_inputs(teacher: Teacher, images: Tensor, number: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Inputs of the attention of block ``number``: normalised tokens, rotary embedding."""
    tokens, _ = teacher.run_blocks(teacher.embed(teacher.preprocess(images)), 0, number)
    return teacher.vit.blocks[number].norm1(tokens), block_arguments(teacher.vit)[number]


def test_tokens_are_timms(family: Family, images: Tensor) -> None:
    teacher = make_teacher(family)
    out = teacher(images)
    tokens = teacher.vit.forward_features(teacher.preprocess(images))
    if isinstance(teacher.vit.norm, nn.Identity):
        tokens = teacher.vit.fc_norm(tokens)
    # The operations and their order are the same; equal bits are likely but not guaranteed.
    torch.testing.assert_close(out.features, tokens[:, family.prefix :], rtol=1e-6, atol=1e-6)
    expected = tokens[:, 0] if family.prefix else tokens.mean(1)
    torch.testing.assert_close(out.class_token, expected, rtol=1e-6, atol=1e-6)
    spread = out.features.std()
    assert 0.5 < spread < 2, "the final norm has not been applied"


def test_logits_are_those_that_the_block_uses(family: Family, images: Tensor) -> None:
    """The tap must match the probabilities that timm's unfused attention passes to a dropout, and
    these applied to the values must give the output of the fused attention."""
    teacher = make_teacher(family)
    attention = teacher.vit.blocks[2].attn
    tokens, arguments = block_inputs(teacher, images, 2)
    with AttentionTap() as tap:
        fused = attention(tokens, **arguments)
    logits = tap.calls[0].logits(prefix=0)

    used: list[Tensor] = []
    attention.attn_drop.register_forward_hook(lambda module, inputs, output: used.append(inputs[0]))
    attention.fused_attn = False
    attention(tokens, **arguments)
    attention.fused_attn = True
    torch.testing.assert_close(logits.softmax(-1), used[0], rtol=1e-5, atol=1e-6)

    mixed = (logits.softmax(-1) @ tap.calls[0].v).transpose(1, 2).flatten(2)
    torch.testing.assert_close(attention.proj(attention.norm(mixed)), fused, rtol=1e-4, atol=1e-5)
    patches = teacher(images).attention_logits[:, 1]
    torch.testing.assert_close(
        patches, logits[:, :, family.prefix :, family.prefix :], rtol=1e-5, atol=1e-5
    )


def test_random_weights_attend_like_trained_ones(family: Family, images: Tensor) -> None:
    logits = make_teacher(family, layers=(0, 1, 2))(images).attention_logits
    assert logits.shape == (2, 3, 4, 16, 16)
    for layer in range(3):
        assert 1 < logits[:, layer].std() < 4
        assert 0.8 < logits[:, layer].std(-1).mean() < 4  # over the keys


def test_cutting_before_any_block_changes_nothing(family: Family, images: Tensor) -> None:
    teacher = make_teacher(family)
    whole = teacher(images)
    for cut in range(4):
        tokens, front = teacher.run_blocks(teacher.embed(teacher.preprocess(images)), 0, cut)
        tokens, tail = teacher.run_blocks(tokens, cut)
        pieces = teacher.finish(tokens, {**front, **tail})
        for one, other in zip(pieces, whole, strict=True):
            assert torch.equal(one, other)


def test_manifest_entry(family: Family) -> None:
    info = make_teacher(family).info()
    assert (info.depth, info.width, info.heads, info.layers) == (3, 48, 4, (0, 2))
    assert (info.grid, info.image_size) == ((4, 4), 4 * family.patch)
    assert info.mean == pytest.approx(family.mean)


def test_only_tapped_layers_compute_logits(images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Tensor] = []
    original = AttentionOperands.logits

    def counted(self: AttentionOperands, prefix: int) -> Tensor:
        made.append(original(self, prefix))
        return made[-1]

    monkeypatch.setattr(AttentionOperands, "logits", counted)
    teacher = make_teacher(FAMILIES[0], layers=(1,))
    _, logits = teacher.run_blocks(teacher.embed(teacher.preprocess(images)))
    assert list(logits) == [1]
    assert len(made) == 1


def test_a_teacher_without_taps_still_gives_features(images: Tensor) -> None:
    out = make_teacher(FAMILIES[0], layers=())(images)
    assert out.attention_logits.shape == (2, 0, 4, 16, 16)
    torch.testing.assert_close(out.features, make_teacher(FAMILIES[0])(images).features)


def test_rotary_embedding_is_in_the_logits(images: Tensor) -> None:
    """Only DINOv3's rotary embedding can distinguish the positions of a constant image."""
    dinov3, clip = (
        make_teacher(next(f for f in FAMILIES if name in f.model), layers=(0,))
        for name in ("dinov3", "clip")
    )
    grey = torch.full_like(images, 128)
    assert dinov3(grey).attention_logits.std(-1).mean() > 0.1
    clip.vit.pos_embed.zero_()
    assert clip(grey).attention_logits.std(-1).mean() < 1e-5


def test_timms_switch_of_fused_attention_does_not_matter(
    images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    fused = make_teacher(FAMILIES[0])(images)
    monkeypatch.setattr(timm.layers.config, "_USE_FUSED_ATTN", 0)
    for one, other in zip(make_teacher(FAMILIES[0])(images), fused, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", ["dinov2", "dinov3"])
def test_logits_are_float32_under_autocast(name: str, images: Tensor) -> None:
    teacher = make_teacher(next(f for f in FAMILIES if name in f.model))
    exact = teacher(images)
    with torch.autocast("cpu", torch.bfloat16):
        rough = teacher(images)
    for one, other in zip(rough, exact, strict=True):
        assert one.dtype == torch.float32
        assert 0 < (one - other).abs().mean() < 0.05 * other.std()


@pytest.mark.parametrize("name", ["clip", "dinov2", "dinov3"])
def test_a_given_image_size_gives_another_grid(name: str, images: Tensor) -> None:
    family = next(f for f in FAMILIES if name in f.model)
    teacher = make_teacher(family, image_size=3 * family.patch)
    assert teacher.grid == (3, 3)
    out = teacher(images)
    assert out.features.shape == (2, 9, 48)
    assert out.attention_logits.shape == (2, 2, 4, 9, 9)


@pytest.mark.parametrize(
    ("model", "kind"),
    [
        ("swin_tiny_patch4_window7_224", "SwinTransformer"),
        ("convnext_tiny", "ConvNeXt"),
        ("resnet18", "ResNet"),
        ("beit_base_patch16_224", "Beit"),
        ("vit_small_patch16_18x2_224", "ParallelThingsBlock"),
    ],
)
def test_models_that_cannot_be_tapped_are_refused(model: str, kind: str) -> None:
    config = TeacherConfig(model=model, weights="random")
    with pytest.raises(UserError, match="cannot be tapped") as caught:
        Teacher(config, resolution=64, layers=(0,))
    message = str(caught.value)
    assert model in message
    assert kind in message
    assert "\n" not in message


def test_layers_and_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UserError, match=r"layer 3; .* has 3 layers, 0 to 2"):
        make_teacher(FAMILIES[0], layers=(1, 3))
    with pytest.raises(UserError, match="20 is not a multiple of the teacher's patch size 14"):
        make_teacher(FAMILIES[0], image_size=20)


@pytest.mark.parametrize(
    "model",
    [
        "vit_small_patch14_dinov2.lvd142m",
        "vit_base_patch16_siglip_224.webli",
        "eva02_base_patch14_224.mim_in22k",
        "convnext_tiny",
    ],
)
def test_shapes_are_those_of_initialised_weights(model: str) -> None:
    with torch.device("meta"):
        expected = timm.create_model(model, num_classes=0).state_dict()
        with _NoInitialisation():
            found = timm.create_model(model, num_classes=0).state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].is_meta
        assert found[name].shape == tensor.shape
        assert found[name].dtype == tensor.dtype


def test_tensors_with_values_are_initialised() -> None:
    with _NoInitialisation():
        weights = nn.init.constant_(torch.ones(2), 3).mul_(2)
    assert weights.tolist() == [6, 6]
