"""Find the vision transformer in a checkpoint, whatever wraps it, and give it its authors' names.

Nested dicts and prefixes of names are the same here: {"teacher": {"backbone.norm.weight": ...}} and
{"teacher.backbone.norm.weight": ...} hold the network 'teacher.backbone.'.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

PATCH_WEIGHTS = (
    "embeddings.patch_embeddings.projection.weight",  # Transformers: DINOv2, ViT, MAE
    "embeddings.patch_embeddings.weight",  # DINOv3
    "embeddings.patch_embedding.weight",  # CLIP, SigLIP
    "radio_model.model.patch_generator.embedder.weight",
    "preprocessor.patchifier.proj.weight",  # AIMv2
    "beit3.vision_embed.proj.weight",
    "patch_embed.projection.weight",  # Sapiens2
    "patch_embed.proj.weight",  # timm, DINO, DINOv2, DINOv3, MAE, MoCo v3, I-JEPA, EVA
    "visual.conv1.weight",  # OpenAI's CLIP
    "conv1.weight",  # Meta's Perception Encoder
)
"""Names of the patch embedding's weight, by which a format is known."""
TRANSFORMERS = PATCH_WEIGHTS[:3]

INVISIBLE = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
"""Parts of names that torch.compile, FSDP and activation checkpointing add, anywhere."""
PREFERRED = (
    *("teacher", "ema", "model_ema", "state_dict_ema", "teacher_state_dict"),  # averages
    "base_encoder",  # as MoCo v3 evaluates
    "encoder",  # as timm and Transformers convert I-JEPA
)
"""Wrappings to take, first to last, where a file holds several networks."""
WRAPPINGS = frozenset(PREFERRED) | {
    *("state_dict", "model_state_dict", "model", "module", "network", "net", "params", "weights"),
    *("student", "student_state_dict", "momentum_encoder", "target_encoder", "online_encoder"),
    *("backbone", "trunk", "visual", "image_encoder", "vision_encoder", "vision_model", "vit"),
    *("vision_tower", "base_model", "dinov2", "dinov2_with_registers", "dinov3_vit", "vit_mae"),
}
"""Parts of names that may stand before a network's own."""

RENAMED = (
    (r"^embeddings\.patch_embeddings?\.(projection\.)?", "patch_embed.proj."),
    (r"^embeddings\.class_embedding$", "cls_token"),
    (r"^embeddings\.position_embeddings?(\.weight)?$", "pos_embed"),
    (r"^embeddings\.", ""),
    (r"^(?:encoder\.layers?|model\.layer|layer)\.(\d+)\.", r"blocks.\1."),
    (r"\.(layernorm_before|layer_norm1)\.", ".norm1."),
    (r"\.(layernorm_after|layer_norm2)\.", ".norm2."),
    (r"\.layer_scale(\d)\.lambda1$", r".ls\1.gamma"),
    (r"\.(attention\.output\.dense|self_attn\.out_proj|attention\.o_proj)\.", ".attn.proj."),
    (
        r"\.(?:attention\.attention|attention|self_attn)\.([qkv])(?:uery|ey|alue|_proj)\.",
        r".attn.\1.",
    ),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"\.mlp\.weights_in\.", ".mlp.w12."),
    (r"\.mlp\.weights_out\.", ".mlp.w3."),
    (r"^(layernorm|post_layernorm)\.", "norm."),
    (r"^pre_layrnorm\.", "norm_pre."),  # their spelling
)
"""Names of Transformers and those of the networks' authors, or timm's."""
GATED = ((".mlp.gate_proj.", ".mlp.w1."), (".mlp.up_proj.", ".mlp.w2."))
PLAIN = ((".mlp.up_proj.", ".mlp.fc1."), (".mlp.down_proj.", ".mlp.fc2."))


class FoundNetwork(NamedTuple):
    """A network in a checkpoint."""

    prefix: str
    """Before its names in the file, without what torch's wrappers add."""
    state: dict[str, Tensor]
    patches: Tensor
    """Weight of its patch embedding."""
    left_out: tuple[str, ...]
    """Beginnings of all other names of tensors in the file."""


def find_network(content: Mapping[Any, Any]) -> FoundNetwork | None:
    """The vision transformer of a checkpoint with its authors' names or timm's; None where no
    patch embedding of a known format is found. Raises ``ValueError`` where the choice among several
    networks is not certain, or where what stands before the names is not known."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in _flatten(content):
        if name in tensors:
            raise ValueError(f"{name} occurs twice")
        tensors[name] = tensor
    networks = {prefix: weight for name in tensors for prefix, weight in _networks(name)}
    known = [p for p in networks if WRAPPINGS.issuperset(p.split(".")[:-1])]
    if not known:
        if networks:
            raise ValueError(f"its names begin with {_listed(networks)}, which is not known")
        return None
    best = min(map(_rank, known))
    chosen = [prefix for prefix in known if _rank(prefix) == best]
    if len(chosen) > 1:
        raise ValueError(f"it holds several networks, {_listed(chosen)}: save one of them alone")
    (prefix,) = chosen
    state = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
    left_out = {".".join(n.split(".")[:2]) for n in tensors if not n.startswith(prefix)}
    patches = tensors[prefix + networks[prefix]]
    if networks[prefix] in TRANSFORMERS:
        state = _from_transformers(state)
    return FoundNetwork(prefix, _without_chunks(state), patches, tuple(sorted(left_out)))


def _flatten(content: Mapping[Any, Any]) -> Iterator[tuple[str, Tensor]]:
    """Dotted names of all tensors in nested dicts, each of which is looked into once."""
    seen = {id(content)}
    waiting: list[tuple[tuple[str, ...], Mapping[Any, Any]]] = [((), content)]
    for above, mapping in waiting:  # grows as it is walked through
        for key, value in mapping.items():
            parts = (*above, *(part for part in str(key).split(".") if part not in INVISIBLE))
            if isinstance(value, Tensor):
                yield ".".join(parts), value
            elif isinstance(value, Mapping) and id(value) not in seen:
                seen.add(id(value))
                waiting.append((parts, value))


def _networks(name: str) -> Iterator[tuple[str, str]]:
    """The text before the network's own names, and the name of its patch embedding's weight, if
    ``name`` is the latter."""
    for weight in PATCH_WEIGHTS:
        if name == weight or name.endswith(f".{weight}"):
            yield name.removesuffix(weight), weight
            return


def _rank(prefix: str) -> int:
    parts = prefix.split(".")
    return min((n for n, part in enumerate(PREFERRED) if part in parts), default=len(PREFERRED))


def _listed(prefixes: Any) -> str:
    return ", ".join(f"'{prefix}'" for prefix in sorted(prefixes)[:4])


def _without_chunks(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """DINOv2's training names blocks.CHUNK.NUMBER, where numbers count on over chunks, as
    blocks.NUMBER."""
    blocks = [name for name in state if name.startswith("blocks.")]
    if not blocks or not all(re.match(r"blocks\.\d+\.\d+\.", name) for name in blocks):
        return state
    renamed = {re.sub(r"^blocks\.\d+\.(\d+\.)", r"blocks.\1", n): t for n, t in state.items()}
    if len(renamed) != len(state):
        raise ValueError("its chunks of blocks have the same numbers")
    return renamed


def _from_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Transformers' names of DINOv2, DINOv3, ViT, MAE, CLIP and SigLIP as those of the authors, or
    timm's; queries, keys and values in one tensor."""
    gated = any(".mlp.gate_proj." in name for name in state)
    feed_forward = (*GATED, (".mlp.down_proj.", ".mlp.w3.")) if gated else PLAIN
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        for pattern, replacement in RENAMED:
            name = re.sub(pattern, replacement, name)
        for old, new in feed_forward:
            name = name.replace(old, new)
        if name in renamed:
            raise ValueError(f"{name} occurs twice")
        renamed[name] = tensor
    dinov3 = "embeddings.patch_embeddings.weight" in state
    renamed = _fused(renamed, no_key_bias=dinov3 and not any("k.bias" in n for n in renamed))
    if "position_ids" in renamed:  # CLIP's 0, 1, 2, ...
        del renamed["position_ids"]
    if dinov3:  # timm knows DINOv3 by this name
        renamed["storage_tokens"] = renamed.pop("register_tokens")
    elif "embeddings.patch_embeddings.projection.weight" in state:
        renamed.setdefault("mask_token", torch.zeros(1))  # timm knows DINOv2 by this name
    if "cls_token" in renamed:
        renamed["cls_token"] = renamed["cls_token"].reshape(1, 1, -1)
    if "pos_embed" in renamed and renamed["pos_embed"].ndim == 2:
        renamed["pos_embed"] = renamed["pos_embed"].unsqueeze(0)
    return renamed


def _fused(state: Mapping[str, Tensor], *, no_key_bias: bool) -> dict[str, Tensor]:
    """Queries, keys and values of a layer as one tensor. With ``no_key_bias`` that of the keys is
    0. Raises ``ValueError`` where one lacks."""
    fused = {}
    for name, tensor in state.items():
        match = re.fullmatch(r"(.*\.attn\.)([qkv])\.(weight|bias)", name)
        if match is None:
            fused[name] = tensor
            continue
        layer, _, leaf = match.groups()
        parts = {letter: state.get(f"{layer}{letter}.{leaf}") for letter in "qkv"}
        if no_key_bias and leaf == "bias":
            parts["k"] = torch.zeros_like(tensor)
        lacking = [letter for letter, found in parts.items() if found is None]
        if lacking:
            raise ValueError(f"{layer}{lacking[0]}.{leaf} is missing")
        fused[f"{layer}qkv.{leaf}"] = torch.cat([t for t in parts.values() if t is not None])
    return fused
