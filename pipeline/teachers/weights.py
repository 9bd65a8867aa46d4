"""Load a teacher's weights: a file in its authors' or timm's key format, the demo's, or random."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import pickle
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from pipeline.assets import DEMO_TEACHER
from pipeline.precision import check_finite
from pipeline.teachers.key_formats import FoundNetwork, find_network
from pipeline.text import unpickling_fault
from schemas.errors import UserError, plain_text
from schemas.extract import TeacherConfig

logger = logging.getLogger(__name__)

NOT_NEEDED = (
    *("head", "classifier.", "attn_pool.", "pooler.", "decoder", "projector", "predictor"),
    *("dino_head", "ibot_head", "mask_token", "masked_embed"),
)
"""Prefixes of weights that no target needs: classifiers and CLIP's projection, SigLIP's and
Transformers' pooling, MAE's decoder, heads of self-distillation, tokens of masked patches."""
MOCO_SMALL_WIDTH, MOCO_SMALL_HEADS = 384, 12
"""MoCo v3's ViT-S has twice as many heads as other ViT-S, which no tensor shows."""
TAIL = ("blocks.", "norm.", "fc_norm.", "rope.")
"""Prefixes of the weights that run after a cut."""


def load_weights(vit: Any, config: TeacherConfig) -> None:
    """Load ``config.weights`` into a timm vision transformer. Raises ``UserError``."""
    if config.weights == "random":
        randomise(vit, config.seed)
        return
    path = DEMO_TEACHER if config.weights == "demo" else Path(config.weights).expanduser()
    content = read_state_dict(path, option="--teacher.weights")
    prefix = ""
    try:
        found = find_network(content)
        if found is not None:
            prefix = found.prefix
            _check_shape(found, vit)
        state = _to_timm_names(content if found is None else found.state, vit)
        vit.load_state_dict(state)
    except (RuntimeError, ValueError) as error:
        reason = _second_line(error)
        raise UserError(_mismatch_message(path, config, reason, prefix, content)) from None
    except Exception:  # timm's converters raise any type for files of other content
        reason = "not a checkpoint in a format that timm knows for this model"
        raise UserError(_mismatch_message(path, config, reason, prefix, content)) from None
    check_finite(vit.state_dict(), f"--teacher.weights '{path}'")
    if found is not None and prefix:
        left_out = ", ".join(found.left_out[:6]) or "nothing"
        logger.info(
            "--teacher.weights '%s': took '%s'; left out: %s",
            path,
            plain_text(prefix),
            plain_text(left_out)[:300],
        )


def load_tail_weights(vit: Any, state: Mapping[str, Tensor], *, complete: bool) -> None:
    """Load the blocks of a teacher's tail from tensors with timm's names, or with ``complete`` the
    complete model. Layers before a tail are never run and may be missing. Raises ``ValueError`` if
    names or shapes differ."""
    try:
        missing, unexpected = vit.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise ValueError(_second_line(error)) from None
    if not complete:
        missing = [name for name in missing if name.startswith(TAIL)]
    if missing or unexpected:
        name = (missing or unexpected)[0]
        raise ValueError(f"{name} is {'missing' if missing else 'unexpected'}")


def _second_line(error: Exception) -> str:
    """Second line of torch's message; the first has no details."""
    lines = [line.strip() for line in str(error).splitlines()]
    return lines[1] if len(lines) > 1 else lines[0]


def _mismatch_message(
    path: Path, config: TeacherConfig, reason: str, prefix: str, content: Mapping[Any, Any]
) -> str:
    """One line with the names that were seen in the file."""
    seen = f"below '{prefix}'" if prefix else ", ".join(f"'{key}'" for key in list(content)[:2])
    return (
        f"--teacher.weights '{path}' do not fit '{config.model}': {reason[:200]} (names seen: "
        f"{plain_text(seen)[:100] or 'none'})"
    )


def _check_shape(found: FoundNetwork, vit: Any) -> None:
    """Raises ``ValueError`` for differences that timm would resample or that no shape shows."""
    size, expected = found.patches.shape[2:], vit.patch_embed.proj.weight.shape[2:]
    if found.patches.ndim == 4 and size != expected:
        raise ValueError(
            f"its patches have {size[0]} pixels, the model's {expected[0]}; choose another model"
        )
    heads = getattr(vit.blocks[0].attn, "num_heads", None)
    moco = {"base_encoder", "momentum_encoder"}.intersection(found.prefix.split("."))
    if moco and vit.embed_dim == MOCO_SMALL_WIDTH and heads != MOCO_SMALL_HEADS:
        raise ValueError(
            f"MoCo v3's ViT-S has {MOCO_SMALL_HEADS} heads, the model {heads}; give "
            f"--teacher.model-args.num_heads {MOCO_SMALL_HEADS}"
        )


def _to_timm_names(state: dict[str, Any], vit: Any) -> dict[str, Tensor]:
    """A checkpoint in its authors' key format with timm's names, without weights that no target
    needs.

    The timm module that defines the model converts these formats and resamples the position
    embedding to the model's grid (bicubic, antialiased), as the HASTE reference does.
    """
    _refuse_dropped_biases(state, vit)
    with contextlib.redirect_stdout(sys.stderr):  # timm prints, but stdout is for results
        state = sys.modules[type(vit).__module__].checkpoint_filter_fn(state, vit)
    return {name: value for name, value in state.items() if not name.startswith(NOT_NEEDED)}


def _refuse_dropped_biases(state: dict[str, Any], vit: Any) -> None:
    """Raises ``ValueError`` for DINOv3's query and value biases if the model has none, because timm
    would drop them.

    They are zero in the published distilled models, so timm has two variants of each.
    """
    if "storage_tokens" not in state or getattr(vit.blocks[0].attn, "q_bias", None) is not None:
        return
    for name, bias in state.items():
        if name.endswith("attn.qkv.bias"):
            query, _, value = bias.chunk(3)
            if query.any() or value.any():
                raise ValueError(f"{name} is not zero; use the model's _qkvb variant")


def read_state_dict(path: Path, *, option: str) -> dict[str, Tensor]:
    """Tensors of a .safetensors, .pth or .pt file; no pickled code is run. Raises ``UserError``,
    which begins with ``option``."""
    if not os.path.isfile(path):  # a pipe or a device might never end
        raise UserError(f"{option} '{path}': cannot read these weights (no such file)")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        # Plain values, which checkpoints of DINO and MAE have as their options.
        with torch.serialization.safe_globals([argparse.Namespace]):
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = unpickling_fault(error)
        raise UserError(f"{option} '{path}': cannot read these weights ({reason})") from None
    except (OSError, RuntimeError, EOFError) as error:
        reason = plain_text(str(error))[:200]
        raise UserError(f"{option} '{path}': cannot read these weights ({reason})") from None
    except Exception as error:  # safetensors raises its own type, which it does not export
        raise UserError(f"{option} '{path}': cannot read these weights ({error})") from None
    if not isinstance(state, dict):
        raise UserError(f"{option} '{path}': expected a state dict, found {type(state).__name__}")
    return state


@torch.no_grad()
def randomise(vit: nn.Module, seed: int) -> None:
    """Set seeded random weights with attention and features similar to a trained model's.

    timm's own initialisation has layer scales of 1e-5, which makes every block an identity. Here
    layer scales are about 0.5, and projections to queries and keys (or their norms) are scaled so
    that attention logits have a std of about 2 at any width.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(tensor: Tensor, std: float, mean: float = 0.0) -> None:
        values = torch.randn(tensor.shape, generator=generator) * std + mean
        tensor.copy_(values)

    for name, parameter in vit.named_parameters():
        owner, _, leaf = name.rpartition(".")
        if leaf == "gamma" or leaf.startswith("gamma_"):  # layer scales
            normal(parameter, 0.2, mean=0.5)
        elif leaf.endswith("bias"):
            normal(parameter, 0.1)
        elif leaf == "weight" and parameter.ndim == 1:  # norms
            normal(parameter, 0.2, mean=1.3 if owner.endswith(("q_norm", "k_norm")) else 1.0)
        elif leaf == "weight":
            std = min(parameter[0].numel() ** -0.5, 0.2)
            widened = owner.endswith(("qkv", "q_proj", "k_proj"))
            normal(parameter, min(1.3 * std, 0.25) if widened else std)
        else:  # class and register tokens, position embedding
            normal(parameter, 0.2)
