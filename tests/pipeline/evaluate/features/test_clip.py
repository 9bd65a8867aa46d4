"""CLIP scores with random weights in the formats of their authors, against plain formulas."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from pipeline.evaluate.features.clip import MEAN, STD, ClipScore
from pipeline.text_encoders.tokenizer import clip_tokenizer
from schemas.errors import UserError

transformers = pytest.importorskip("transformers", reason="the extra `text` is not installed")
pytest.importorskip("open_clip", reason="CLIP's vocabulary is not installed (extra `text`)")

WIDTH, HEADS, LAYERS, SIZE, PATCH, OUT = 16, 2, 2, 28, 14, 8
CAPTIONS = ["a red car", "Two DOGS, in the rain", "word " * 100]
State = dict[str, Tensor]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny CLIP in the files of the hub, without a tokenizer."""
    part = {
        "hidden_size": WIDTH,
        "num_attention_heads": HEADS,
        "intermediate_size": 24,
        "num_hidden_layers": LAYERS,
    }
    config = transformers.CLIPConfig(
        text_config=part,
        vision_config={**part, "image_size": SIZE, "patch_size": PATCH},
        projection_dim=OUT,
    )
    model = transformers.CLIPModel(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    place = tmp_path_factory.mktemp("clip")
    model.save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def state(folder: Path) -> State:
    return transformers.CLIPModel.from_pretrained(folder).state_dict()


@pytest.fixture(scope="module")
def images() -> Tensor:
    """uint8 (3, 3, 40, 60): neither square nor of the network's size."""
    rng = np.random.default_rng(0)
    rough = torch.from_numpy(rng.integers(0, 256, (3, 3, 5, 7)).astype(np.float32))
    return F.interpolate(rough, (40, 60), mode="bilinear").round().byte()


def tower(state: State, prefix: str, x: Tensor, *, causal: bool) -> Tensor:
    """Pre-norm transformer blocks of CLIP, from their weights alone."""

    def linear(name: str, x: Tensor) -> Tensor:
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def norm(name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, (WIDTH,), state[f"{name}.weight"], state[f"{name}.bias"])

    for number in range(LAYERS):
        at = f"{prefix}.encoder.layers.{number}"
        y = norm(f"{at}.layer_norm1", x)
        parts = (linear(f"{at}.self_attn.{name}_proj", y) for name in "qkv")
        q, k, v = (p.unflatten(-1, (HEADS, -1)).transpose(1, 2) for p in parts)
        scores = q @ k.transpose(-2, -1) / (WIDTH // HEADS) ** 0.5
        if causal:
            scores += torch.full(scores.shape[-2:], -torch.inf, dtype=x.dtype).triu(1)
        y = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + linear(f"{at}.self_attn.out_proj", y)
        y = linear(f"{at}.mlp.fc1", norm(f"{at}.layer_norm2", x))
        x = x + linear(f"{at}.mlp.fc2", y * torch.sigmoid(1.702 * y))
    return x


def expected_cosines(state: State, images: Tensor) -> Tensor:
    """Cosines (B,) in float64; the images by Pillow."""
    state = {name: tensor.double() for name, tensor in state.items()}
    ids = clip_tokenizer()(CAPTIONS, padding="max_length", truncation=True, return_tensors="pt")
    ids = ids["input_ids"]
    text = state["text_model.embeddings.token_embedding.weight"][ids]
    text = text + state["text_model.embeddings.position_embedding.weight"]
    text = tower(state, "text_model", text, causal=True)
    last = [f"text_model.final_layer_norm.{kind}" for kind in ("weight", "bias")]
    text = F.layer_norm(text, (WIDTH,), state[last[0]], state[last[1]])
    ends = (ids == 49407).int().argmax(1)
    text = text[torch.arange(len(ids)), ends] @ state["text_projection.weight"].T

    cut = []
    for image in images:
        picture = Image.fromarray(image.permute(1, 2, 0).numpy())
        picture = picture.resize((42, SIZE), Image.Resampling.BICUBIC)  # 60 * 28 / 40
        cut.append(np.asarray(picture.crop((7, 0, 35, SIZE))))
    pixels = (np.stack(cut) / 255 - np.array(MEAN)) / np.array(STD)
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    x = F.conv2d(x, state["vision_model.embeddings.patch_embedding.weight"], stride=PATCH)
    start = state["vision_model.embeddings.class_embedding"].expand(len(x), 1, -1)
    x = torch.cat([start, x.flatten(2).transpose(1, 2)], 1)
    x = x + state["vision_model.embeddings.position_embedding.weight"]
    for name in ("pre_layrnorm", "post_layernorm"):
        if name == "post_layernorm":
            x = tower(state, "vision_model", x, causal=False)[:, 0]
        weight, bias = (state[f"vision_model.{name}.{kind}"] for kind in ("weight", "bias"))
        x = F.layer_norm(x, (WIDTH,), weight, bias)
    return F.cosine_similarity(x @ state["visual_projection.weight"].T, text)


def official(state: State) -> State:
    """openai/clip-vit-large-patch14's file, with its buffers of positions."""
    positions = {
        f"{part}_model.embeddings.position_ids": torch.arange(3) for part in ("text", "vision")
    }
    return {**positions, **state}


def openai(state: State) -> State:
    """OpenAI's own names, which open_clip has too."""
    out = {
        "logit_scale": state["logit_scale"],
        "text_projection": state["text_projection.weight"].T,
        "visual.proj": state["visual_projection.weight"].T,
        "visual.class_embedding": state["vision_model.embeddings.class_embedding"],
        "visual.conv1.weight": state["vision_model.embeddings.patch_embedding.weight"],
        "visual.positional_embedding": state["vision_model.embeddings.position_embedding.weight"],
        "positional_embedding": state["text_model.embeddings.position_embedding.weight"],
        "token_embedding.weight": state["text_model.embeddings.token_embedding.weight"],
    }
    for kind in ("weight", "bias"):
        out[f"ln_final.{kind}"] = state[f"text_model.final_layer_norm.{kind}"]
        out[f"visual.ln_pre.{kind}"] = state[f"vision_model.pre_layrnorm.{kind}"]
        out[f"visual.ln_post.{kind}"] = state[f"vision_model.post_layernorm.{kind}"]
        for ours, theirs in (("text_model", ""), ("vision_model", "visual.")):
            for number in range(LAYERS):
                at, block = (
                    f"{ours}.encoder.layers.{number}",
                    f"{theirs}transformer.resblocks.{number}",
                )
                thirds = [state[f"{at}.self_attn.{letter}_proj.{kind}"] for letter in "qkv"]
                out[f"{block}.attn.in_proj_{kind}"] = torch.cat(thirds)
                out[f"{block}.attn.out_proj.{kind}"] = state[f"{at}.self_attn.out_proj.{kind}"]
                out[f"{block}.ln_1.{kind}"] = state[f"{at}.layer_norm1.{kind}"]
                out[f"{block}.ln_2.{kind}"] = state[f"{at}.layer_norm2.{kind}"]
                out[f"{block}.mlp.c_fc.{kind}"] = state[f"{at}.mlp.fc1.{kind}"]
                out[f"{block}.mlp.c_proj.{kind}"] = state[f"{at}.mlp.fc2.{kind}"]
    return out


def lightning(state: State) -> State:
    """A training checkpoint around OpenAI's names."""
    return {f"model.{name}": tensor for name, tensor in openai(state).items()}


@pytest.mark.parametrize("names", [official, openai, lightning])
def test_score_is_the_mean_cosine(
    names: Callable[[State], State],
    folder: Path,
    state: State,
    images: Tensor,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    file = tmp_path / "clip.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in names(state).items()}, file)
    score = ClipScore(str(folder), str(file))
    score.add(images[:2], CAPTIONS[:2])
    score.add(images[2:], CAPTIONS[2:])
    cosines = expected_cosines(state, images)
    assert cosines.std() > 0.01
    # torchvision's resizing is Pillow's up to rounding in 8 bits
    assert score.score() == pytest.approx(max(0.0, 100 * cosines.mean().item()), abs=0.2)
    assert "1 of 3 captions were truncated to 77 tokens" in capsys.readouterr().err
    assert ClipScore(str(folder), "hub").name == score.name


def test_random_weights_are_of_their_seed(folder: Path) -> None:
    one, same, other = (ClipScore(str(folder), "random", seed=seed) for seed in (0, 0, 1))
    assert one.name == same.name != other.name


def test_weights_that_do_not_fit(folder: Path, state: State, tmp_path: Path) -> None:
    file = tmp_path / "text.pt"
    torch.save({n: t for n, t in state.items() if not n.startswith("vision_model.")}, file)
    with pytest.raises(UserError, match=r"--clip-weights '.*text.pt' do not fit '.*vision_model"):
        ClipScore(str(folder), str(file))
    torch.save({**state, "visual_projection.weight": torch.zeros(3, 3)}, file)
    with pytest.raises(UserError, match=r"visual_projection.weight has shape \(3, 3\)"):
        ClipScore(str(folder), str(file))
    with pytest.raises(UserError, match="no such file; expected a FILE, 'hub' or 'random'"):
        ClipScore(str(folder), str(tmp_path / "nowhere.pt"))
    with pytest.raises(UserError, match="--clip 'no/folder/here' is neither a folder nor"):
        ClipScore("no/folder/here", "random")
