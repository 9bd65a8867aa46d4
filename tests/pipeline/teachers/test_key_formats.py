"""Wrapped checkpoints and Transformers' names: loaded as a whole and certainly, or refused."""

from __future__ import annotations

import argparse
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.teachers import Teacher
from schemas.extract import TeacherConfig
from tests.pipeline.teachers.test_weights import (
    State,
    clip,
    dinov2,
    dinov2_registers,
    dinov3,
    make_teacher,
    open_clip_siglip,
    refusal,
    renamed,
)

DINOV2 = "vit_base_patch14_dinov2.lvd142m"
REGISTERS = "vit_base_patch14_reg4_dinov2.lvd142m"
PLAIN = "vit_base_patch16_224.dino"


def below(prefix: str, state: State) -> State:
    return {f"{prefix}{name}": value for name, value in state.items()}


def other(state: State) -> State:
    """Another network of the same shapes."""
    return {name: torch.randn_like(value) for name, value in state.items()}


# Wrappings


def dino_training(state: State) -> State:
    """github.com/facebookresearch/dino, checkpoint.pth, with the options of the run."""
    head = {"head.mlp.0.weight": torch.randn(8, 48), "head.last_layer.weight_g": torch.ones(4, 1)}
    return {
        "student": below("module.", below("backbone.", other(state)) | head),
        "teacher": below("backbone.", state) | head,
        "optimizer": {"state": {0: {"exp_avg": torch.randn(3)}}, "param_groups": [{"lr": 1e-3}]},
        "epoch": 3,
        "args": argparse.Namespace(arch="vit_base", patch_size=16),
    }


def moco(state: State) -> State:
    """github.com/facebookresearch/moco-v3."""
    head = {"head.0.weight": torch.randn(8, 48), "head.1.running_mean": torch.zeros(8)}
    names = below("module.base_encoder.", state | head)
    names |= below("module.momentum_encoder.", other(state) | head)
    names |= {"module.predictor.0.weight": torch.randn(8, 8)}
    return {"epoch": 300, "arch": "vit_base", "state_dict": names, "optimizer": {"state": {}}}


def mae_training(state: State) -> State:
    decoder = {"mask_token": torch.randn(1, 1, 32), "decoder_blocks.0.norm1.weight": torch.ones(3)}
    return {"model": state | decoder, "scaler": {"scale": torch.ones(1)}, "args": "x"}


def timm_training(state: State) -> State:
    """timm's train.py: its averaged weights are those that it loads."""
    return {"state_dict": other(state), "state_dict_ema": below("module.", state), "arch": "vit"}


def lightning(state: State) -> State:
    return {
        "state_dict": below("model.encoder._orig_mod.", state) | {"head.weight": torch.ones(2, 48)},
        "pytorch-lightning_version": "2.0",
    }


def i_jepa(state: State) -> State:
    return {
        "encoder": below("module.", state),
        "target_encoder": below("module.", other(state)),
        "predictor": {"module.predictor_embed.weight": torch.ones(8, 48)},
    }


def dinov2_training(state: State) -> State:
    """github.com/facebookresearch/dinov2 with FSDP: chunks of blocks whose numbers count on."""
    state = dinov2(state)
    chunks = {
        re.sub(r"^blocks\.(\d+)\.", r"blocks.\1._fsdp_wrapped_module.\1.", name): value
        for name, value in state.items()
    }
    return {
        "teacher": below("backbone._fsdp_wrapped_module.", chunks)
        | {"dino_head.last_layer.weight_v": torch.randn(4, 8)}
    }


def dinov2_flat(state: State) -> State:
    state = dinov2(state)
    return below("student.backbone.", other(state)) | below("teacher.backbone.", state)


@pytest.mark.parametrize(
    ("model", "wrap", "prefix"),
    [
        (PLAIN, dino_training, "teacher.backbone."),
        (PLAIN, moco, "state_dict.module.base_encoder."),
        (PLAIN, mae_training, "model."),
        (PLAIN, timm_training, "state_dict_ema.module."),
        (PLAIN, lightning, "state_dict.model.encoder."),
        (PLAIN, i_jepa, "encoder.module."),
        (DINOV2, dinov2_training, "teacher.backbone."),
        (DINOV2, dinov2_flat, "teacher.backbone."),
        (DINOV2, lambda s: {"model": below("module.", dinov2(s))}, "model.module."),
        (DINOV2, lambda s: below("student.", dinov2(s)), "student."),
        (REGISTERS, lambda s: below("teacher.backbone.", dinov2_registers(s)), "teacher.backbone."),
        (
            "vit_base_patch16_dinov3_qkvb.lvd1689m",
            lambda s: {"teacher": below("backbone.", dinov3(s))},
            "teacher.backbone.",
        ),
        (
            "vit_base_patch16_clip_quickgelu_224.openai",
            lambda s: {"state_dict": below("module.", clip(s))},
            "state_dict.module.",
        ),
        (
            "vit_base_patch16_siglip_224.webli",
            lambda s: below("_orig_mod.module.", open_clip_siglip(s)),
            "module.visual.trunk.",
        ),
    ],
)
def test_wrapped_networks_are_loaded_as_a_whole(
    model: str,
    wrap: Callable[[State], State],
    prefix: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(logging.getLogger("pipeline"), "propagate", True)
    caplog.set_level(logging.INFO)
    assert_same_network(model, wrap, tmp_path)
    assert f"took '{prefix}'; left out: " in caplog.text


def assert_same_network(model: str, wrap: Callable[[State], State], folder: Path) -> None:
    """Saved by ``wrap`` and loaded, a random network has its weights and targets."""
    teacher = make_teacher(model)
    saved = wrap({name: value.clone() for name, value in teacher.vit.state_dict().items()})
    torch.save(saved, folder / "weights.pth")
    loaded = make_teacher(model, folder / "weights.pth")
    for name, value in teacher.vit.state_dict().items():
        torch.testing.assert_close(loaded.vit.state_dict()[name], value, rtol=0, atol=1e-6)
    images = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)
    for found, expected in zip(targets(loaded, images), targets(teacher, images), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def targets(teacher: Teacher, images: Tensor) -> tuple[Tensor, ...]:
    with torch.no_grad():
        return tuple(teacher(images))


# Transformers


def split_qkv(state: State, layer: str, parts: tuple[str, str, str]) -> State:
    """blocks.N.attn.qkv.* as ``layer`` of queries, keys and values."""
    split = {}
    for name, value in state.items():
        match = re.fullmatch(r"blocks\.(\d+)\.attn\.qkv\.(weight|bias)", name)
        if match is None:
            split[name] = value
            continue
        for part, tensor in zip(parts, value.chunk(3), strict=True):
            split[f"blocks.{match[1]}.attn.{layer}{part}.{match[2]}"] = tensor.clone()
    return split


WORDS, LETTERS = ("query", "key", "value"), ("q_proj", "k_proj", "v_proj")


def hf_dinov2(state: State) -> State:
    """Dinov2Model and Dinov2WithRegistersModel."""
    state = dinov2_registers(state) if "reg_token" in state else dinov2(state)
    names = renamed(
        split_qkv(state, "attention.", WORDS),
        ("attn.attention", "attention.attention"),
        ("attn.proj", "attention.output.dense"),
        ("ls1.gamma", "layer_scale1.lambda1"),
        ("ls2.gamma", "layer_scale2.lambda1"),
        ("mlp.w12", "mlp.weights_in"),
        ("mlp.w3", "mlp.weights_out"),
        ("blocks.", "encoder.layer."),
        ("patch_embed.proj", "embeddings.patch_embeddings.projection"),
        ("pos_embed", "embeddings.position_embeddings"),
    )
    for token in ("cls_token", "mask_token", "register_tokens"):
        if token in names:
            names[f"embeddings.{token}"] = names.pop(token)
    return renamed_start(names, ("norm.", "layernorm."))


def renamed_start(state: State, *swaps: tuple[str, str]) -> State:
    for old, new in swaps:
        state = {
            new + name.removeprefix(old) if name.startswith(old) else name: value
            for name, value in state.items()
        }
    return state


def hf_vit(state: State) -> State:
    """ViTModel: DINO, MAE, MSN and the classifiers."""
    names = renamed(
        split_qkv(state, "attention.", WORDS),
        ("attn.attention", "attention.attention"),
        ("attn.proj", "attention.output.dense"),
        ("mlp.fc1", "intermediate.dense"),
        ("mlp.fc2", "output.dense"),
        ("norm1", "layernorm_before"),
        ("norm2", "layernorm_after"),
        ("blocks.", "encoder.layer."),
        ("patch_embed.proj", "embeddings.patch_embeddings.projection"),
        ("pos_embed", "embeddings.position_embeddings"),
        ("cls_token", "embeddings.cls_token"),
    )
    return renamed_start(names, ("norm.", "layernorm.")) | {"pooler.dense.weight": torch.ones(1)}


def hf_clip(state: State) -> State:
    names = renamed(
        split_qkv(state, "", LETTERS),
        ("attn.proj", "attn.out_proj"),
        ("attn.", "self_attn."),
        ("norm1", "layer_norm1"),
        ("norm2", "layer_norm2"),
        ("norm_pre", "pre_layrnorm"),
        ("blocks.", "encoder.layers."),
        ("patch_embed.proj", "embeddings.patch_embedding"),
    )
    names["embeddings.position_embedding.weight"] = names.pop("pos_embed").squeeze(0)
    if "cls_token" in names:
        names["embeddings.class_embedding"] = names.pop("cls_token").flatten()
    names["embeddings.position_ids"] = torch.arange(17)[None]
    names = renamed_start(names, ("norm.", "post_layernorm."))
    return below("vision_model.", names) | {"logit_scale": torch.ones(())}


def hf_dinov3(state: State) -> State:
    """DINOv3ViTModel; the keys have no bias."""
    names = renamed(
        split_qkv(dinov3(state), "", LETTERS),
        ("attn.proj", "attn.o_proj"),
        ("attn.", "attention."),
        ("ls1.gamma", "layer_scale1.lambda1"),
        ("ls2.gamma", "layer_scale2.lambda1"),
        ("mlp.fc1_g", "mlp.gate_proj"),
        ("mlp.fc1_x", "mlp.up_proj"),
        ("mlp.fc1", "mlp.up_proj"),
        ("mlp.fc2", "mlp.down_proj"),
        ("blocks.", "layer."),
        ("patch_embed.proj", "embeddings.patch_embeddings"),
        ("cls_token", "embeddings.cls_token"),
        ("storage_tokens", "embeddings.register_tokens"),
        ("mask_token", "embeddings.mask_token"),
    )
    return {
        name: value
        for name, value in names.items()
        if not name.endswith(("k_proj.bias", "bias_mask", "periods"))
    }


@pytest.mark.parametrize(
    ("model", "convert"),
    [
        (DINOV2, hf_dinov2),
        (REGISTERS, hf_dinov2),
        (DINOV2, lambda s: below("dinov2.", hf_dinov2(s)) | {"classifier.bias": torch.ones(2)}),
        (PLAIN, hf_vit),
        (PLAIN, lambda s: below("vit.", hf_vit(s)) | {"decoder.mask_token": torch.ones(2)}),
        ("vit_base_patch16_clip_quickgelu_224.openai", hf_clip),
        ("vit_base_patch16_siglip_224.webli", hf_clip),
        ("vit_base_patch16_dinov3_qkvb.lvd1689m", hf_dinov3),
        ("vit_base_patch16_dinov3.lvd1689m", hf_dinov3),
        ("vit_huge_plus_patch16_dinov3.lvd1689m", hf_dinov3),
    ],
)
def test_names_of_transformers(
    model: str, convert: Callable[[State], State], tmp_path: Path
) -> None:
    assert_same_network(model, convert, tmp_path)


def test_transformers_gated_dinov2(tmp_path: Path) -> None:
    def convert(state: State) -> State:
        return hf_dinov2(renamed(state, ("mlp.fc1", "mlp.w12"), ("mlp.fc2", "mlp.w3")))

    assert_same_network("vit_giant_patch14_dinov2.lvd142m", convert, tmp_path)


# Files whose mapping is not certain


def without(name: str) -> Callable[[State], State]:
    return lambda state: {key: value for key, value in state.items() if key != name}


def two_students(state: State) -> State:
    return below("student.", state) | below("model.", other(state))


@pytest.mark.parametrize(
    ("wrap", "reason"),
    [
        (two_students, "it holds several networks, 'model.', 'student.': save one of them"),
        (lambda s: below("my.tower.", s), "its names begin with 'my.tower.', which is not known"),
        (
            lambda s: below("teacher.", without("blocks.1.norm2.bias")(s)),
            r"Missing key.* \"blocks.1.norm2.bias\". \(names seen: below 'teacher.'\)",
        ),
        (
            lambda s: below("module.", s | {"blocks.0.attn.qkv.lora_A.weight": torch.ones(2, 2)}),
            r"Unexpected key.* \"blocks.0.attn.qkv.lora_A.weight\". \(.* below 'module.'\)",
        ),
        (
            lambda s: s | below("_orig_mod.", s),
            "patch_embed|occurs twice",
        ),
        (lambda s: {"module._flat_param": torch.ones(9)}, r"\(names seen: 'module._flat_param'\)"),
        (lambda s: without("encoder.layer.0.attention.attention.key.bias")(hf_vit(s)), "k.bias is"),
        (
            lambda s: without("encoder.layer.0.attention.attention.key.weight")(hf_vit(s)),
            "blocks.0.attn.k.weight is missing",
        ),
        (
            lambda s: s | {"patch_embed.proj.weight": torch.ones(48, 3, 8, 8)},
            "its patches have 8 pixels, the model's 16",
        ),
    ],
)
def test_what_is_not_certain_is_refused(
    wrap: Callable[[State], State], reason: str, tmp_path: Path
) -> None:
    torch.save(wrap(dict(make_teacher(PLAIN).vit.state_dict())), tmp_path / "weights.pth")
    message = refusal(PLAIN, tmp_path / "weights.pth")
    assert f"do not fit '{PLAIN}'" in message
    assert re.search(reason, message), message


@pytest.mark.parametrize(
    "nest",
    [
        lambda s: {"model": s},
        lambda s: {"state_dict": s},
        lambda s: {"teacher": below("backbone.", s)},
        lambda s: below("module.", s),
    ],
)
def test_biases_of_nested_dinov3_are_not_lost(
    nest: Callable[[State], State], tmp_path: Path
) -> None:
    state = make_teacher("vit_base_patch16_dinov3_qkvb").vit.state_dict()
    torch.save(nest(dinov3(dict(state))), tmp_path / "weights.pth")
    assert "_qkvb" in refusal("vit_base_patch16_dinov3", tmp_path / "weights.pth")


def test_dicts_that_hold_themselves_are_looked_into_once(tmp_path: Path) -> None:
    circle: dict[str, Any] = {}
    circle.update({f"part{number}": circle for number in range(50)})
    torch.save({"model": circle}, tmp_path / "weights.pth")
    assert "do not fit" in refusal(PLAIN, tmp_path / "weights.pth")


def test_moco_s_small_model_has_twelve_heads(tmp_path: Path) -> None:
    """Its file has the shapes of other ViT-S, which have six."""

    def small(weights: str | Path, heads: int) -> Teacher:
        arguments = {"depth": 1, "num_heads": heads}
        config = TeacherConfig(
            model="vit_small_patch16_224", weights=str(weights), model_args=arguments
        )
        return Teacher(config, resolution=64, layers=(0,))

    teacher = small("random", 12)
    torch.save(moco(dict(teacher.vit.state_dict())), tmp_path / "weights.pth")
    assert small(tmp_path / "weights.pth", 12).weights_sha256 == teacher.weights_sha256
    with pytest.raises(
        Exception, match=r"ViT-S has 12 heads, the model 6; give --teacher.model-args"
    ):
        small(tmp_path / "weights.pth", 6)


def test_a_class_in_a_file_is_named(tmp_path: Path) -> None:
    state: dict[str, Any] = dict(make_teacher(PLAIN).vit.state_dict())
    torch.save({"model": state, "args": Path("x")}, tmp_path / "weights.pth")
    message = refusal(PLAIN, tmp_path / "weights.pth")
    assert "it holds a pathlib." in message
    assert "no code is run" in message
