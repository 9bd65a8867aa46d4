"""Checks of a request for images that need neither a checkpoint nor torch."""

from __future__ import annotations

from pipeline.checkpoints.resolve import require_checkpoint
from schemas.errors import UserError
from schemas.sample import SampleConfig

NOT_FOR_A_GRID = ("npz", "folder", "labels", "workers", "ray_address")
"""Options of single images only."""


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
    require_checkpoint(config.checkpoint)
