"""Checks of a request for images that need neither a checkpoint nor torch."""

from __future__ import annotations

from pathlib import Path

from pipeline.checkpoints.resolve import require_checkpoint
from schemas.errors import UserError
from schemas.sample import SampleConfig, SampleTextConfig

NOT_FOR_A_GRID = ("npz", "folder", "labels", "workers", "ray_address")
"""Options of single images only."""
PROMPTS = ("caption", "captions", "store")
"""Options that give captions."""


def check_options(config: SampleConfig) -> None:
    """Raises ``UserError`` for options that do not go together, and without a checkpoint."""
    if config.png is None and config.num is None:
        raise UserError("give --png FILE for a grid, or --num N with --npz FILE or --folder DIR")
    if config.png is not None and config.num is not None:
        raise UserError("--png draws a grid and --num single images: give one of them")
    if config.num is None:
        for key in NOT_FOR_A_GRID:
            if key in config.model_fields_set:
                raise UserError(
                    f"--{key.replace('_', '-')} is for --num, not for the grid of --png"
                )
    else:
        if config.npz is None and config.folder is None:
            raise UserError("--num needs --npz FILE or --folder DIR for its images")
        if config.npz is not None and config.npz.endswith("/"):
            raise UserError(f"--npz '{config.npz}' is the name of a folder: name a file")
        if "per_class" in config.model_fields_set:
            raise UserError("--per-class is for --png; with --num, use --labels balanced")
    _check_prompts(config)
    require_checkpoint(config.checkpoint)


def _check_prompts(config: SampleConfig) -> None:
    given = [key for key in PROMPTS if getattr(config, key) is not None]
    if len(given) > 1:
        raise UserError(f"--{given[0]} and --{given[1]} both give captions: give one of them")
    if given:
        for key in ("classes", "labels"):
            if key in config.model_fields_set:
                raise UserError(f"--{key} is for students of classes, --{given[0]} of captions")
    elif config.negative_prompt is not None:
        raise UserError("--negative-prompt is for captions: give --caption, --captions or --store")
    elif config.text != SampleTextConfig():
        raise UserError("--text.* is for captions: give --caption, --captions or --store")
    if config.negative_prompt is not None and config.sampler.guidance == 1:
        raise UserError(
            "--negative-prompt acts through guidance, which is off: set --sampler.guidance above 1"
        )
    if config.text.stream is not None and config.store is None:
        raise UserError("--text.stream chooses captions of a store: give --store")
    if config.captions is not None and "://" not in config.captions:
        path = Path(config.captions).expanduser()
        if not path.is_file():
            found = "is a folder" if path.is_dir() else "does not exist"
            raise UserError(f"--captions '{config.captions}' {found}; expected a file of captions")
