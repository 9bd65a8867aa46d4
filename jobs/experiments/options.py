"""Options of an experiment: one store, several arms, several seeds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from pipeline.pretrain.options import AutoencoderConfig, ClassifierConfig, SelfDistillConfig
from schemas.base import Strict
from schemas.diffusion import SamplerConfig
from schemas.errors import UserError
from schemas.fields import Name, StreamName

CONFIGS = Path(__file__).parent
DIGITS = "digits"


class JudgeConfig(Strict):
    """The judge's measurements, at each checkpoint of each run."""

    images: Annotated[int, Field(ge=4)] = 1000
    """Images of averaged weights, of all classes in turn, from the same noise for all runs."""
    batch_size: Annotated[int, Field(ge=1)] = 100
    """Images that are sampled at a time."""
    sampler: SamplerConfig = SamplerConfig(method="ode", steps=16)
    neighbours: Annotated[int, Field(ge=1)] = 3
    """Neighbours of precision and recall."""


class MatrixConfig(Strict):
    """Options of an experiment; files of jobs/experiments hold those of each data set."""

    source: str | None = None
    """Images: 'digits' (scikit-learn's), a zip of train/CLASS/NAME, or a folder of CLASS/NAME."""
    output: str | None = None
    """Folder of the artifacts, runs and results."""
    held_out: Annotated[int, Field(ge=1)] = 500
    """Images of each class that are not trained on, the last by name."""
    resolution: Annotated[int, Field(ge=16, le=1024)] = 32
    """Pixels per side."""
    demo_networks: bool = False
    """Take the demo's teacher and autoencoder, which were trained on all digits without labels,
    instead of training some on the images."""
    teacher: SelfDistillConfig = SelfDistillConfig()
    autoencoder: AutoencoderConfig = AutoencoderConfig()
    judge: ClassifierConfig = ClassifierConfig()
    """The evaluation classifier, trained apart from teacher and students."""
    store: dict[str, Any] = Field(default={})
    """Options of the extraction."""
    streams: dict[StreamName, dict[str, Any]] = Field(default={})
    """Further teacher streams of the store: options of the extraction by name, for example
    {control: {teacher: {weights: random}}}."""
    run: dict[str, Any] = Field(default={})
    """Options of every training run."""
    arms: dict[Name, dict[str, Any]] = Field(default={})
    """Names of the compared runs and the options of each. The first is what others are compared
    with."""
    pairs: dict[Name, Name] = Field(default={})
    """Arms whose alignment ends, each with the arm that differs from it in that alone."""
    measure: JudgeConfig = JudgeConfig()
    seeds: tuple[int, ...] = (0,)
    """Each arm is trained once with each seed."""
    select: tuple[str, ...] = ()
    """Arms to train by this command (default: all)."""
    processes: Annotated[int, Field(ge=1)] = 1
    """Runs that are trained at the same time, each by a process with one arithmetic thread; 1: in
    this process, with all threads."""
    threads: Annotated[int, Field(ge=1)] = 4
    """Threads that decode images for the extraction."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device of all training and evaluation; auto is cuda if torch can use a GPU."""

    @property
    def folder(self) -> Path:
        """The absolute folder ``output``."""
        return Path(str(self.output)).expanduser().absolute()


def check_options(config: MatrixConfig) -> None:
    """Raises ``UserError`` for a source that is needed and missing, and for unknown arms."""
    if not config.arms:
        raise UserError(
            "there are no arms: name some in the table 'arms' of --config, for example --config "
            "jobs/experiments/digits.yaml"
        )
    lost = [name for pair in config.pairs.items() for name in pair if name not in config.arms]
    if lost:
        raise UserError(f"pairs names {lost[0]}: the arms are {', '.join(config.arms)}")
    if config.source is None:
        raise UserError("--source is missing: digits, a zip of train/CLASS/NAME, or a folder")
    if config.output is None:
        raise UserError("--output is missing: the folder of runs and results")
    unknown = [name for name in config.select if name not in config.arms]
    if unknown:
        raise UserError(f"--select {unknown[0]}: the arms are {', '.join(config.arms)}")
    if not config.seeds:
        raise UserError("--seeds is empty: name numbers such as 0,1,2")
    twice = next((seed for seed in config.seeds if config.seeds.count(seed) > 1), None)
    if twice is not None:
        raise UserError(f"--seeds names {twice} twice")
    if config.source == DIGITS or (config.folder / "images").is_dir():
        return
    if not Path(config.source).exists():
        raise UserError(f"--source '{config.source}' does not exist: digits, a zip or a folder")
