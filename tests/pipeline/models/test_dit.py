"""DiT against diffusers' implementation, and its taps."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from diffusers import DiTTransformer2DModel
from torch import Tensor

from pipeline.models import DiT, SiT, Taps, make_student
from schemas.student import StudentConfig

CONFIG = StudentConfig(
    model="DiT-S/2", depth=3, width=48, heads=4, latent_size=8, num_classes=10, latent_channels=4
)


@pytest.fixture
def dit() -> DiT:
    """No weight is zero, so that every block and the final layer matter."""
    torch.manual_seed(0)
    student = make_student(CONFIG)
    assert isinstance(student, DiT)
    for parameter in student.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return student.eval().requires_grad_(False)


def inputs(batch: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    """Latents, timesteps with the first and the last, labels with "no class"."""
    x = torch.randn(batch, *CONFIG.latent_shape, generator=torch.Generator().manual_seed(1))
    return x, torch.tensor([0, 1, 250, 640, 999]), torch.tensor([0, 3, 7, 9, 10])


def as_diffusers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights under the names of ``DiTTransformer2DModel``."""
    named = {
        "pos_embed.pos_embed": state["pos_embed"],
        "pos_embed.proj.weight": state["x_embedder.proj.weight"],
        "pos_embed.proj.bias": state["x_embedder.proj.bias"],
    }
    table = "class_embedder.embedding_table.weight"
    for number in range(CONFIG.size.depth):
        ours, theirs = f"blocks.{number}", f"transformer_blocks.{number}"
        # every block has a copy of the one embedding of time and class
        named[f"{theirs}.norm1.emb.{table}"] = state["y_embedder.embedding_table.weight"]
        for kind in ("weight", "bias"):
            for their_layer, our_layer in (("linear_1", "0"), ("linear_2", "2")):
                name = f"{theirs}.norm1.emb.timestep_embedder.{their_layer}.{kind}"
                named[name] = state[f"t_embedder.mlp.{our_layer}.{kind}"]
            for letter, part in zip("qkv", state[f"{ours}.attn.qkv.{kind}"].chunk(3), strict=True):
                named[f"{theirs}.attn1.to_{letter}.{kind}"] = part
            for their_name, our_name in (
                ("attn1.to_out.0", "attn.proj"),
                ("norm1.linear", "adaLN_modulation.1"),
                ("ff.net.0.proj", "mlp.fc1"),
                ("ff.net.2", "mlp.fc2"),
            ):
                named[f"{theirs}.{their_name}.{kind}"] = state[f"{ours}.{our_name}.{kind}"]
    for kind in ("weight", "bias"):
        named[f"proj_out_1.{kind}"] = state[f"final_layer.adaLN_modulation.1.{kind}"]
        named[f"proj_out_2.{kind}"] = state[f"final_layer.linear.{kind}"]
    return named


def diffusers_dit(state: Mapping[str, Tensor]) -> DiTTransformer2DModel:
    size = CONFIG.size
    model = DiTTransformer2DModel(
        num_attention_heads=size.heads,
        attention_head_dim=size.width // size.heads,
        in_channels=CONFIG.latent_channels,
        out_channels=2 * CONFIG.latent_channels,
        num_layers=size.depth,
        sample_size=CONFIG.latent_size,
        patch_size=size.patch_size,
        num_embeds_ada_norm=CONFIG.num_classes,
        norm_eps=1e-6,  # the paper's code; diffusers' default is 1e-5
    )
    for block in model.transformer_blocks:
        # The DiT repository's frequencies are 10000^(-i/128). Diffusers divides by 127, which makes
        # its sines differ from those that the released weights were trained with.
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    missing, unexpected = model.load_state_dict(as_diffusers(state), strict=False)
    assert not missing
    assert set(unexpected) <= {"pos_embed.pos_embed"}  # a buffer that diffusers may not save
    torch.testing.assert_close(model.pos_embed.pos_embed, state["pos_embed"], atol=1e-6, rtol=0)
    return model.eval()


@torch.no_grad()
def test_forward_is_that_of_diffusers(dit: DiT) -> None:
    """float32; 1e-5 of the output's scale is rounding: the two sum in different orders."""
    x, t, y = inputs()
    expected = diffusers_dit(dit.state_dict())(x, t, y).sample
    got = dit(x, t, y).prediction
    assert got.shape == (5, 8, 8, 8)
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_taps_do_not_change_the_prediction(dit: DiT) -> None:
    x, t, y = inputs()
    plain = dit(x, t, y)
    tapped = dit(x, t, y, Taps(feature_depth=2, attention_layers=(0, 2), heads=3))
    assert torch.equal(plain.prediction, tapped.prediction)
    assert plain.features is None
    assert plain.attention_logits is None
    assert tapped.features.shape == (5, 16, 48)
    assert tapped.attention_logits.shape == (5, 2, 3, 16, 16)


def test_tapped_logits_make_the_attention_that_diffusers_computes(dit: DiT) -> None:
    """Query and key of diffusers' block 0, from its own projections; same tolerance as above."""
    x, t, y = inputs()
    logits = dit(x, t, y, Taps(attention_layers=(0,), heads=4)).attention_logits
    seen: list[Tensor] = []
    model = diffusers_dit(dit.state_dict())
    attention = model.transformer_blocks[0].attn1
    for layer in (attention.to_q, attention.to_k):
        layer.register_forward_hook(lambda module, args, out: seen.append(out))
    with torch.no_grad():
        model(x, t, y)
    q, k = (out.unflatten(-1, (4, 12)).transpose(1, 2) for out in seen)
    expected = q @ k.transpose(-2, -1) / 12**0.5
    assert (logits[:, 0] - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_differs_from_sit_in_the_final_layer_alone() -> None:
    sit = make_student(CONFIG.model_copy(update={"model": "SiT-S/2"}))
    dit = make_student(CONFIG)
    assert type(sit) is SiT
    shapes, others = ({n: p.shape for n, p in m.state_dict().items()} for m in (sit, dit))
    assert shapes.keys() == others.keys()
    different = {name for name in shapes if shapes[name] != others[name]}
    assert different == {"final_layer.linear.weight", "final_layer.linear.bias"}


def test_starts_as_zero_noise_and_the_middle_of_the_variances() -> None:
    x, t, y = inputs()
    assert not make_student(CONFIG)(x, t, y).prediction.any()
