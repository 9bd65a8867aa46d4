"""Weights of text encoders in their authors' names, as names of Transformers."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

OPENAI_BLOCK = re.compile(r"transformer\.resblocks\.(\d+)\.(.+)")
OPENAI_NAMES = {
    "token_embedding.weight": "embeddings.token_embedding.weight",
    "positional_embedding": "embeddings.position_embedding.weight",
    "ln_final.weight": "final_layer_norm.weight",
    "ln_final.bias": "final_layer_norm.bias",
}
OPENAI_VISION = {
    "class_embedding": "embeddings.class_embedding",
    "conv1.weight": "embeddings.patch_embedding.weight",
    "positional_embedding": "embeddings.position_embedding.weight",
    "ln_pre.weight": "pre_layrnorm.weight",
    "ln_pre.bias": "pre_layrnorm.bias",
    "ln_post.weight": "post_layernorm.weight",
    "ln_post.bias": "post_layernorm.bias",
}
"""Names below ``visual.`` and Transformers' below ``vision_model.``, one of them misspelt."""
OPENAI_PARTS = {
    "attn.out_proj": "self_attn.out_proj",
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
TIED = {
    "encoder.embed_tokens.weight": "shared.weight",
    "shared.weight": "encoder.embed_tokens.weight",
}
"""T5's two names of one tensor; files may have either."""


def convert_weights(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a file that a model with the state ``wanted`` needs, by its names.

    The file may hold a larger model, such as both towers of CLIP or a T5 with its decoder: the
    encoder's names may follow any prefix. Raises ``ValueError`` naming a tensor that is missing or
    of another shape.
    """
    state = _from_openai(state)
    # Transformers 4 has a prefix in memory that version 5 has in files only
    short = {name.removeprefix("text_model."): name for name in wanted}
    prefix = _prefix(state, short)
    found: dict[str, Tensor] = {}
    for name, full in short.items():
        tensor = state.get(prefix + name)
        if tensor is None and name in TIED:
            tensor = state.get(prefix + TIED[name])
        if tensor is None and name.endswith("position_ids"):
            continue
        if tensor is None:
            raise ValueError(f"{prefix}{name} is missing")
        if tensor.shape != wanted[full].shape:
            shapes = f"{tuple(tensor.shape)}, the encoder's {tuple(wanted[full].shape)}"
            raise ValueError(f"{prefix}{name} has shape {shapes}")
        found[full] = tensor
    return found


def convert_clip(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a file for a CLIP with both towers, of Transformers' names ``wanted``. Raises
    ``ValueError`` naming a tensor that is missing or of another shape."""
    text = {name: tensor for name, tensor in wanted.items() if name.startswith("text_model.")}
    found = convert_weights(state, text)
    mark = next((name for name in state if name.endswith("visual.class_embedding")), None)
    if mark is not None:
        prefix = mark.removesuffix("visual.class_embedding")
        state = _clip_from_openai(
            {n.removeprefix(prefix): tensor for n, tensor in state.items() if n.startswith(prefix)}
        )
    else:
        last = "visual_projection.weight"
        prefix = next((name.removesuffix(last) for name in state if name.endswith(last)), "")
        state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    for name in wanted.keys() - found.keys():
        if name.endswith("position_ids"):
            continue
        if name not in state:
            raise ValueError(f"{name} is missing")
        if state[name].shape != wanted[name].shape:
            shapes = f"{tuple(state[name].shape)}, the network's {tuple(wanted[name].shape)}"
            raise ValueError(f"{name} has shape {shapes}")
        found[name] = state[name]
    return found


def _clip_from_openai(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The image tower, projections and scale of OpenAI's CLIP and open_clip."""
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        own = name.removeprefix("visual.")
        match = OPENAI_BLOCK.fullmatch(own)
        if name in ("visual.proj", "text_projection"):
            kind = "visual" if name == "visual.proj" else "text"
            found[f"{kind}_projection.weight"] = tensor.T
        elif name == "logit_scale":
            found[name] = tensor
        elif own in OPENAI_VISION and own != name:
            found[f"vision_model.{OPENAI_VISION[own]}"] = tensor
        elif match is not None and own != name:
            layer = f"vision_model.encoder.layers.{match[1]}."
            found |= _block(layer, match[2], tensor)
    return found


def _prefix(state: Mapping[str, Tensor], short: Mapping[str, str]) -> str:
    """The prefix below which most of the encoder's names are, the shortest of several."""
    last = next(name for name in reversed(list(short)) if name.endswith("weight"))
    prefixes = [name.removesuffix(last) for name in state if f".{name}".endswith(f".{last}")]
    if not prefixes:
        return ""

    def held(prefix: str) -> int:
        return sum(prefix + name in state for name in short)

    return max(sorted(prefixes, key=len), key=held)


def _from_openai(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names of OpenAI's CLIP and open_clip, below any prefix, as those of Transformers; other
    states unchanged."""
    marks = [name for name in state if name.endswith("token_embedding.weight")]
    prefix = next(
        (
            name.removesuffix("token_embedding.weight")
            for name in marks
            if f"{name.removesuffix('token_embedding.weight')}ln_final.weight" in state
        ),
        None,
    )
    if prefix is None:
        return dict(state)
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if not name.startswith(prefix):
            continue
        own = name.removeprefix(prefix)
        match = OPENAI_BLOCK.fullmatch(own)
        if own in OPENAI_NAMES:
            found[OPENAI_NAMES[own]] = tensor
        elif match is not None:
            found |= _block(f"encoder.layers.{match[1]}.", match[2], tensor)
    return found


def _block(layer: str, part: str, tensor: Tensor) -> dict[str, Tensor]:
    if part.startswith("attn.in_proj_"):
        kind = part.removeprefix("attn.in_proj_")
        parts = zip("qkv", tensor.chunk(3), strict=True)
        return {f"{layer}self_attn.{letter}_proj.{kind}": third for letter, third in parts}
    owner, _, kind = part.rpartition(".")
    return {f"{layer}{OPENAI_PARTS[owner]}.{kind}": tensor} if owner in OPENAI_PARTS else {}
