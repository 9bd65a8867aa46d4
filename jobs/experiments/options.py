"""Options of the experiment on CIFAR-10."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from pipeline.pretrain.options import AutoencoderConfig, ClassifierConfig, SelfDistillConfig
from schemas.base import Strict
from schemas.errors import UserError

DEFAULTS = Path(__file__).parent / "cifar10.yaml"


class Cifar10Config(Strict):
    """Options of the experiment; their defaults are in jobs/experiments/cifar10.yaml."""

    source: str | None = None
    """The zip of CIFAR-10's training images: train/CLASS/NAME.jpg."""
    work: str = "runs/cifar10"
    """Folder of the artifacts, runs and results."""
    held_out: Annotated[int, Field(ge=1)] = 500
    """Images of each class that are not trained on."""
    teacher: SelfDistillConfig = SelfDistillConfig()
    autoencoder: AutoencoderConfig = AutoencoderConfig()
    judge: ClassifierConfig = ClassifierConfig()
    """The evaluation classifier."""
    store: dict[str, Any] = Field(default={})
    """Options of the extraction."""
    run: dict[str, Any] = Field(default={})
    """Options of every training run."""
    arms: dict[str, dict[str, Any]] = Field(default={})
    """Names of the compared runs and the options of each."""
    seeds: tuple[int, ...] = (0,)
    """Each arm is trained once with each seed."""
    select: tuple[str, ...] = ()
    """Arms to train in this process (default: all)."""
    threads: Annotated[int, Field(ge=1)] = 4
    """Threads that decode images for the extraction."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device of all training and evaluation; auto is cuda if torch can use a GPU."""


def check_options(config: Cifar10Config) -> None:
    """Raises ``UserError`` for a source that is needed and missing, and for unknown arms."""
    if config.source is None:
        raise UserError("--source is missing: the zip of CIFAR-10's training images")
    unknown = [name for name in config.select if name not in config.arms]
    if unknown:
        raise UserError(f"--select {unknown[0]}: the arms are {', '.join(config.arms)}")
    if not Path(config.source).is_file() and not Path(config.work, "images").expanduser().is_dir():
        raise UserError(f"--source '{config.source}' is not a readable zip: there is no such file")
