"""Sources of a teacher's weights: every authors' key format, and refused files."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

from pipeline.storage import hub
from pipeline.teachers import Teacher
from pipeline.teachers.weights import read_state_dict
from schemas.errors import UserError
from schemas.extract import TeacherConfig

SMALL = {"embed_dim": 48, "depth": 2, "num_heads": 4}
State = dict[str, Any]


def make_teacher(model: str, weights: str | Path = "random", seed: int = 0) -> Teacher:
    config = TeacherConfig(model=model, weights=str(weights), seed=seed, model_args=SMALL)
    return Teacher(config, resolution=64, layers=(1,))


def refusal(model: str, weights: str | Path) -> str:
    """The one-line error for these weights."""
    with pytest.raises(UserError) as caught:
        make_teacher(model, weights)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 500
    return message


def renamed(state: State, *swaps: tuple[str, str]) -> State:
    for old, new in swaps:
        state = {name.replace(old, new): value for name, value in state.items()}
    return state


# timm's names to the authors', with the other entries of their files


def dinov2(state: State) -> State:
    """github.com/facebookresearch/dinov2: one position embedding of class token and patches."""
    state["mask_token"] = torch.randn(1, 48)
    return renamed(state)


def dinov2_registers(state: State) -> State:
    """Registers have no position embedding; the class token's is added to the class token."""
    state = dinov2(renamed(state, ("reg_token", "register_tokens")))
    class_place = torch.randn(1, 1, 48)
    state["cls_token"] = state["cls_token"] - class_place
    state["pos_embed"] = torch.cat([class_place, state["pos_embed"]], dim=1)
    return state


def dinov2_giant(state: State) -> State:
    return renamed(dinov2_registers(state), ("mlp.fc1", "mlp.w12"), ("mlp.fc2", "mlp.w3"))


def dinov3(state: State) -> State:
    """github.com/facebookresearch/dinov3: one bias of q, k and v, with k's masked out."""
    state = renamed(
        state,
        ("reg_token", "storage_tokens"),
        ("gamma_1", "ls1.gamma"),
        ("gamma_2", "ls2.gamma"),
    )
    for number in range(2):
        attention = f"blocks.{number}.attn."
        query = state.pop(f"{attention}q_bias", torch.zeros(48))
        value = state.pop(f"{attention}v_bias", torch.zeros(48))
        state[f"{attention}qkv.bias"] = torch.cat([query, torch.full((48,), 7.0), value])
        state[f"{attention}qkv.bias_mask"] = torch.full((144,), float("nan"))
    state["mask_token"] = torch.randn(1, 48)
    state["rope_embed.periods"] = torch.randn(3)
    return state


def dinov3_gated(state: State) -> State:
    return renamed(
        dinov3(state), ("mlp.fc1_g", "mlp.w1"), ("mlp.fc1_x", "mlp.w2"), ("mlp.fc2", "mlp.w3")
    )


def clip(state: State) -> State:
    """github.com/openai/CLIP: image tower and text tower."""
    state = renamed(
        state,
        ("norm_pre", "ln_pre"),
        ("norm1", "ln_1"),
        ("norm2", "ln_2"),
        ("attn.qkv.", "attn.in_proj_"),
        ("attn.proj.", "attn.out_proj."),
        ("mlp.fc1", "mlp.c_fc"),
        ("mlp.fc2", "mlp.c_proj"),
        ("blocks.", "transformer.resblocks."),
        ("patch_embed.proj", "conv1"),
    )
    state["class_embedding"] = state.pop("cls_token").flatten()
    state["positional_embedding"] = state.pop("pos_embed").squeeze(0)
    state["ln_post.weight"], state["ln_post.bias"] = (
        state.pop("norm.weight"),
        state.pop("norm.bias"),
    )
    state["proj"] = torch.randn(48, 24)
    image_tower = {f"visual.{name}": value for name, value in state.items()}
    text_tower = {
        "transformer.resblocks.0.ln_1.weight": torch.randn(32),
        "token_embedding.weight": torch.randn(100, 32),
        "logit_scale": torch.tensor(4.6),
    }
    return image_tower | text_tower


def mae(state: State) -> State:
    """github.com/facebookresearch/mae, the released encoders."""
    return {"model": state}


def mae_with_decoder(state: State) -> State:
    decoder = {
        "mask_token": torch.randn(1, 1, 32),
        "decoder_pos_embed": torch.randn(1, 17, 32),
        "decoder_embed.weight": torch.randn(32, 48),
        "decoder_blocks.0.norm1.weight": torch.randn(32),
    }
    return {"model": state | decoder}


def open_clip_siglip(state: State) -> State:
    """github.com/mlfoundations/open_clip, with a timm model for its image tower."""
    state["attn_pool.latent"] = torch.randn(1, 1, 48)
    image_tower = {f"visual.trunk.{name}": value for name, value in state.items()}
    return image_tower | {"text.positional_embedding": torch.randn(64, 32)}


def timm_with_classifier(state: State) -> State:
    return state | {"head.weight": torch.randn(1000, 48), "head.bias": torch.randn(1000)}


FORMATS = [
    ("vit_base_patch14_dinov2.lvd142m", dinov2),
    ("vit_base_patch14_reg4_dinov2.lvd142m", dinov2_registers),
    ("vit_giant_patch14_reg4_dinov2.lvd142m", dinov2_giant),
    ("vit_base_patch16_dinov3.lvd1689m", dinov3),
    ("vit_base_patch16_dinov3_qkvb.lvd1689m", dinov3),
    ("vit_huge_plus_patch16_dinov3.lvd1689m", dinov3_gated),
    ("vit_base_patch16_clip_quickgelu_224.openai", clip),
    ("vit_base_patch16_224.mae", mae),
    ("vit_base_patch16_224.mae", mae_with_decoder),
    ("vit_base_patch16_siglip_224.webli", open_clip_siglip),
    ("vit_base_patch16_224", timm_with_classifier),
]


@pytest.mark.parametrize(("model", "convert"), FORMATS)
def test_authors_key_formats(
    model: str,
    convert: Callable[[State], State],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    teacher = make_teacher(model)
    path = tmp_path / "weights.pth"
    torch.save(convert({k: v.clone() for k, v in teacher.vit.state_dict().items()}), path)
    loaded = make_teacher(model, path)
    for name, value in teacher.vit.state_dict().items():
        torch.testing.assert_close(loaded.vit.state_dict()[name], value, rtol=0, atol=1e-6)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "model",
    [
        "vit_base_patch14_reg4_dinov2",
        "vit_giant_patch14_dinov2",
        "vit_base_patch16_dinov3_qkvb",
        "vit_base_patch16_clip_224",
        "vit_base_patch16_siglip_224",
        "vit_base_patch16_rope_mixed_224",
        "eva02_base_patch14_448",  # separate q, k and v
    ],
)
def test_timms_own_safetensors(model: str, tmp_path: Path) -> None:
    """A store has its teacher's weights in this format, too."""
    teacher = make_teacher(model)
    save_file(teacher.vit.state_dict(), tmp_path / "model.safetensors")
    loaded = make_teacher(model, tmp_path / "model.safetensors")
    assert loaded.weights_sha256 == teacher.weights_sha256


def test_position_embedding_is_resampled_to_the_grid(tmp_path: Path) -> None:
    model = "vit_base_patch16_clip_224.openai"
    state = make_teacher(model).vit.state_dict()
    places = state["pos_embed"] = torch.randn(1, 1 + 14 * 14, 48)
    torch.save(state, tmp_path / "weights.pth")
    loaded: Tensor = make_teacher(model, tmp_path / "weights.pth").vit.pos_embed
    grid = places[:, 1:].unflatten(1, (14, 14)).permute(0, 3, 1, 2)
    grid = torch.nn.functional.interpolate(grid, size=(4, 4), mode="bicubic", antialias=True)
    expected = torch.cat([places[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)
    torch.testing.assert_close(loaded, expected)


def test_dinov3_biases_are_not_lost(tmp_path: Path) -> None:
    state = make_teacher("vit_base_patch16_dinov3_qkvb").vit.state_dict()
    torch.save(dinov3(dict(state)), tmp_path / "weights.pth")
    assert "_qkvb" in refusal("vit_base_patch16_dinov3", tmp_path / "weights.pth")


# Random weights


def test_random_weights_are_those_of_their_seed() -> None:
    torch.manual_seed(1)
    one = make_teacher("vit_base_patch14_dinov2", seed=3)
    torch.manual_seed(2)
    again, other = (make_teacher("vit_base_patch14_dinov2", seed=seed) for seed in (3, 4))
    assert one.weights_sha256 == again.weights_sha256
    assert one.weights_sha256 != other.weights_sha256
    assert all(torch.isfinite(value).all() for value in one.vit.state_dict().values())


@pytest.mark.parametrize("model", ["vit_base_patch16_dinov3_qkvb", "vit_base_patch16_siglip_224"])
def test_random_weights_leave_nothing_as_timm_made_it(model: str) -> None:
    for parameter in make_teacher(model).vit.parameters():
        assert parameter.std() > 0.01


# Refused weights


def test_unknown_models() -> None:
    assert "Unknown model (vit_of_my_own)" in refusal("vit_of_my_own", "hub")
    assert "lvd999" in refusal("vit_base_patch14_dinov2.lvd999", "hub")
    assert "No pretrained weights" in refusal("vit_base_patch32_plus_256", "hub")


def test_a_download_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    create = timm.create_model

    def offline(*args: Any, pretrained: bool = False, **kwargs: Any) -> Any:
        if pretrained:
            raise OSError("We couldn't connect to the hub.\n\nCheck your connection.\n" + "x" * 999)
        return create(*args, **kwargs)

    monkeypatch.setattr(timm, "create_model", offline)
    monkeypatch.setattr(hub, "_unreachable", lambda: None)
    assert "couldn't connect to the hub. Check" in refusal("vit_base_patch14_dinov2", "hub")


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pt"])
@pytest.mark.parametrize(
    "content", [b"", b"not weights", b"\x80\x02" + bytes(64)], ids=["empty", "text", "pickle"]
)
def test_damaged_files(suffix: str, content: bytes, tmp_path: Path) -> None:
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(content)
    message = refusal("vit_base_patch14_dinov2", path)
    assert "--teacher.weights" in message
    assert "cannot read these weights" in message


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_truncated_files(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"weights{suffix}"
    state = make_teacher("vit_base_patch14_dinov2").vit.state_dict()
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    path.write_bytes(path.read_bytes()[:-1000])
    assert "cannot read these weights" in refusal("vit_base_patch14_dinov2", path)


def test_missing_file(tmp_path: Path) -> None:
    for name in ("none.pth", "none.safetensors"):
        assert "no such file" in refusal("vit_base_patch14_dinov2", tmp_path / name)


def test_weights_that_are_not_finite_are_named(tmp_path: Path) -> None:
    """Also for the cut 'image', whose extraction does not run the teacher."""
    state = make_teacher("vit_small_patch14_dinov2.lvd142m").vit.state_dict()
    state["blocks.1.mlp.fc1.bias"][3] = float("nan")
    save_file(state, tmp_path / "nan.safetensors")
    message = refusal("vit_small_patch14_dinov2.lvd142m", tmp_path / "nan.safetensors")
    assert "1 of 192 numbers of blocks.1.mlp.fc1.bias are not finite" in message


def test_a_folder_is_not_a_file(tmp_path: Path) -> None:
    assert "cannot read these weights" in refusal("vit_base_patch14_dinov2", tmp_path)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (torch.ones(3), "expected a state dict"),
        ([torch.ones(3)], "expected a state dict"),
        ({"model": 5}, "do not fit"),
        ({"weight": torch.ones(3)}, "do not fit"),
        ({1: torch.ones(3)}, "do not fit"),
        ({}, "do not fit"),
    ],
)
def test_files_of_something_else(content: Any, complaint: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "weights.pth")
    for model in ("vit_base_patch14_dinov2", "vit_base_patch16_dinov3"):
        assert complaint in refusal(model, tmp_path / "weights.pth")


def test_another_models_file(tmp_path: Path) -> None:
    models = (
        "vit_base_patch14_dinov2",
        "vit_base_patch14_reg4_dinov2",
        "vit_giant_patch14_dinov2",
        "vit_base_patch16_dinov3",
        "vit_base_patch16_clip_224",
        "vit_base_patch16_siglip_224",
    )
    for model in models:
        torch.save(make_teacher(model).vit.state_dict(), tmp_path / f"{model}.pth")
    for model in models:
        for other in models:
            if other != model:
                message = refusal(model, tmp_path / f"{other}.pth")
                assert f"do not fit '{model}'" in message


def test_another_widths_file(tmp_path: Path) -> None:
    config = TeacherConfig(
        model="vit_base_patch16_224",
        weights="random",
        model_args={"embed_dim": 60, "depth": 2, "num_heads": 4},
    )
    wide = Teacher(config, resolution=64, layers=(1,))
    torch.save(wide.vit.state_dict(), tmp_path / "weights.pth")
    assert "size mismatch" in refusal("vit_base_patch16_224", tmp_path / "weights.pth")


class Bomb:
    """Unpickling an instance makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.path),))


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin"])
def test_pickled_code_is_not_run(suffix: str, tmp_path: Path) -> None:
    path, made = tmp_path / f"weights{suffix}", tmp_path / "made"
    torch.save({"model": {"cls_token": Bomb(made)}}, path)
    assert "no code is run" in refusal("vit_base_patch14_dinov2", path)
    assert not made.exists()


@pytest.mark.parametrize("name", ["/dev/zero", "x" * 5000, "", "\0"])
def test_only_regular_files_are_read(name: str) -> None:
    """A manifest is untrusted and may name any path."""
    with pytest.raises(UserError, match=r"cannot read these weights \(no such file\)"):
        read_state_dict(Path(name), option="--teacher.weights")
