"""Text encoders with random weights, in the key formats of their authors."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from pipeline.text_encoders import TextEncoder, encoder_size
from schemas.errors import UserError
from schemas.extract import TextConfig
from tests.captions import TEXT

transformers = pytest.importorskip("transformers", reason="the extra `text` is not installed")
tokenizers = pytest.importorskip("tokenizers")
pytest.importorskip("open_clip", reason="CLIP's vocabulary is not installed (extra `text`)")

CAPTIONS = ["a red car", "two dogs", "", "word " * 100]
CLIP = TextConfig.model_validate(TEXT)
T5_ARGUMENTS = {"d_model": 16, "d_ff": 24, "d_kv": 8, "num_heads": 2, "num_layers": 1}


@pytest.fixture
def t5(tmp_path: Path) -> TextConfig:
    """A tiny T5 with a tokenizer of five words, padded with 0."""
    words = ["<pad>", "</s>", "<unk>", "a", "red", "car", "two", "dogs"]
    model = tokenizers.models.WordLevel({word: n for n, word in enumerate(words)}, "<unk>")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(tmp_path / "tokenizer")
    return TextConfig(
        encoder="google/t5-v1_1-small",
        weights="random",
        tokenizer=str(tmp_path / "tokenizer"),
        model_args=T5_ARGUMENTS,
        max_tokens=20,
    )


def with_weights(config: TextConfig, file: Path) -> TextConfig:
    return config.model_copy(update={"weights": str(file)})


def official_clip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """openai/clip-vit-large-patch14's file: both towers."""
    text = {f"text_model.{name.removeprefix('text_model.')}": t for name, t in state.items()}
    return {
        "logit_scale": torch.ones(()),
        "text_projection.weight": torch.ones(4, 16),
        "vision_model.embeddings.position_embedding.weight": torch.ones(5, 16),
        **text,
    }


def openai_clip(state: dict[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """OpenAI's own names, which open_clip has too."""
    state = {name.removeprefix("text_model."): tensor for name, tensor in state.items()}
    out = {
        "token_embedding.weight": state["embeddings.token_embedding.weight"],
        "positional_embedding": state["embeddings.position_embedding.weight"],
        "ln_final.weight": state["final_layer_norm.weight"],
        "ln_final.bias": state["final_layer_norm.bias"],
        "text_projection": torch.ones(16, 4),
    }
    layer, block = "encoder.layers.0.", "transformer.resblocks.0."
    for kind in ("weight", "bias"):
        thirds = [state[f"{layer}self_attn.{letter}_proj.{kind}"] for letter in "qkv"]
        out[f"{block}attn.in_proj_{kind}"] = torch.cat(thirds)
        for theirs, ours in (
            ("attn.out_proj", "self_attn.out_proj"),
            ("ln_1", "layer_norm1"),
            ("ln_2", "layer_norm2"),
            ("mlp.c_fc", "mlp.fc1"),
            ("mlp.c_proj", "mlp.fc2"),
        ):
            out[f"{block}{theirs}.{kind}"] = state[f"{layer}{ours}.{kind}"]
    out |= {f"visual.{block}ln_1.weight": torch.ones(9), "visual.ln_post.weight": torch.ones(9)}
    return {prefix + name: tensor for name, tensor in out.items()}


def prefixed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A Stable Diffusion checkpoint."""
    text = {
        f"cond_stage_model.transformer.{name}": tensor
        for name, tensor in official_clip(state).items()
    }
    return {"model.diffusion_model.out.weight": torch.ones(3), **text}


@pytest.mark.parametrize(
    "form",
    [
        dict,
        official_clip,
        prefixed,
        openai_clip,
        lambda s: openai_clip(s, "module.text."),
        lambda s: {"state_dict": official_clip(s), "epoch": 3},
    ],
    ids=["transformers", "official", "stable diffusion", "openai", "open_clip", "checkpoint"],
)
def test_clip_in_every_key_format(form: object, tmp_path: Path) -> None:
    made = TextEncoder(CLIP)
    torch.manual_seed(1)
    for parameter in made.model.parameters():  # biases are 0 at first
        parameter.copy_(torch.randn_like(parameter) * 0.2)
    torch.save(form(dict(made.model.state_dict())), tmp_path / "clip.pt")
    read = TextEncoder(with_weights(CLIP, tmp_path / "clip.pt"))
    torch.testing.assert_close(read(CAPTIONS), made(CAPTIONS), rtol=0, atol=0)


@pytest.mark.parametrize("dropped", ["shared.weight", "encoder.embed_tokens.weight"])
def test_t5_with_its_decoder(t5: TextConfig, dropped: str, tmp_path: Path) -> None:
    made = TextEncoder(t5)
    state = {f"m.{name}": t.clone() for name, t in made.model.state_dict().items()}
    state[f"m.{dropped.replace('encoder', 'decoder')}x"] = torch.ones(2)
    del state[f"m.{dropped}"]
    state["m.decoder.final_layer_norm.weight"] = torch.ones(16)
    save_file(state, tmp_path / "t5.safetensors")
    read = TextEncoder(with_weights(t5, tmp_path / "t5.safetensors"))
    torch.testing.assert_close(read(CAPTIONS), made(CAPTIONS), rtol=0, atol=0)


def test_clip_pads_with_its_end_and_sees_the_padding() -> None:
    encoder = TextEncoder(CLIP)
    tokens = encoder.tokenizer(CAPTIONS)
    assert tokens.ids.shape == (4, 77)
    assert tokens.lengths.tolist() == [5, 4, 2, 102]
    assert tokens.ids[0, 5:].tolist() == [49407] * 72
    assert tokens.ids[3, -1] == 49407  # truncated before its end
    with torch.no_grad():
        plain = encoder.model(input_ids=torch.from_numpy(tokens.ids)).last_hidden_state
    torch.testing.assert_close(encoder.encode(tokens), plain, rtol=0, atol=0)


def test_other_encoders_do_not_see_the_padding(t5: TextConfig) -> None:
    encoder = TextEncoder(t5)
    tokens = encoder.tokenizer(["a red car"])
    assert tokens.mask.sum() == tokens.lengths[0] == 3
    other = tokens._replace(ids=np.where(tokens.mask, tokens.ids, 7))
    found, changed = encoder.encode(tokens), encoder.encode(other)
    torch.testing.assert_close(found[:, :3], changed[:, :3])
    assert not torch.allclose(found[:, 3:], changed[:, 3:])


def test_a_seed_determines_random_weights() -> None:
    state = torch.get_rng_state()
    first, second = TextEncoder(CLIP), TextEncoder(CLIP)
    assert first.weights_sha256 == second.weights_sha256
    assert torch.equal(state, torch.get_rng_state())
    other = TextEncoder(CLIP.model_copy(update={"seed": 1}))
    assert other.weights_sha256 != first.weights_sha256


def test_tokens_need_no_weights() -> None:
    encoder = TextEncoder(CLIP.model_copy(update={"keep": "tokens", "weights": "missing.pt"}))
    assert encoder.model is None
    assert encoder.info().weights_sha256 is None


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"weights": "missing.pt"}, "--text.weights 'missing.pt': cannot read these weights"),
        ({"max_tokens": 78}, "--text.max-tokens 78: .* has 77 positions"),
        ({"model_args": {"heads": 3}}, r"--text.model-args.heads: .* has no key"),
        ({"model_args": {"num_attention_heads": 5}}, "cannot encode a caption"),
        ({"encoder": "/missing/folder"}, "neither a folder nor the name of a hub model"),
    ],
)
def test_bad_options_are_one_line(changes: dict[str, object], reason: str) -> None:
    with pytest.raises(UserError, match=reason) as error:
        TextEncoder(CLIP.model_copy(update=changes))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("change", ["missing", "shape", "nan"])
def test_weights_that_do_not_fit_are_named(change: str, tmp_path: Path) -> None:
    state = official_clip(dict(TextEncoder(CLIP).model.state_dict()))
    name = "text_model.encoder.layers.0.mlp.fc1.bias"
    if change == "missing":
        del state[name]
    else:
        state[name] = torch.full((24 if change == "nan" else 23,), torch.nan)
    torch.save(state, tmp_path / "clip.pt")
    with pytest.raises(UserError, match=r"mlp\.fc1\.bias"):
        TextEncoder(with_weights(CLIP, tmp_path / "clip.pt"))


def test_tokens_of_another_vocabulary_are_refused(t5: TextConfig) -> None:
    with pytest.raises(UserError, match="they do not belong together"):
        TextEncoder(t5.model_copy(update={"tokenizer": "open_clip"}))


@pytest.mark.parametrize("package", ["transformers", "open_clip"])
def test_a_missing_package_is_one_line(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if package == "transformers":
        monkeypatch.setitem(sys.modules, package, None)
    else:
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install '\.\[text\]'"):
        TextEncoder(CLIP.model_copy(update={"tokenizer": "open_clip"}))


def test_sizes_of_known_encoders_need_no_weights() -> None:
    assert encoder_size(TextConfig()) == (77, 768)
    assert encoder_size(TextConfig(encoder="google/t5-v1_1-xxl", max_tokens=256)) == (256, 4096)
    assert encoder_size(CLIP) == (77, 16)
