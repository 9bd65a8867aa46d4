"""Does the alignment help, and does its end? Six arms, any seeds, one store of CIFAR-10.

    python jobs/experiments/cifar10.py --source cifar10_train.zip --work runs/cifar10
    python jobs/experiments/cifar10.py --source cifar10_train.zip --work runs/cifar10_cpu \
        --config jobs/experiments/cifar10_cpu.yaml

A teacher is self-distilled on the training images without labels, an autoencoder and a judge (a
classifier, trained apart from the teacher) on the same; then every arm trains on one store, with
equal steps and seeds, and is judged at several steps by the Fréchet distance on the judge's
features. Interrupted, the same command goes on. It runs in one plain process and needs no cluster;
with --select and --seeds several processes share the matrix once the ingredients are there.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, Literal

ROOT = Path(__file__).resolve().parents[2]
if not __package__:  # run as a file: Python then looks beside this file, not in the repository root
    sys.path.insert(0, str(ROOT))

import torch
from pydantic import Field

from jobs.experiments.artifacts import (
    JUDGE_SEED,
    RESOLUTION,
    ArtifactCache,
    complete_store,
    digest_of_reference,
    dumped,
    judged_by,
    make_autoencoder,
    make_judge,
    make_reference,
    make_teacher,
    read_images,
    say,
    unpack,
)
from jobs.experiments.results import write_outcome
from jobs.pretrain.autoencoder import AutoencoderConfig
from jobs.pretrain.classifier import ClassifierConfig
from jobs.pretrain.self_distill import SelfDistillConfig
from pipeline.cli.command import run_command
from pipeline.cli.config_files import merge
from pipeline.cli.options import parse_options
from pipeline.distributed.process_group import ProcessGroup
from pipeline.storage.locks import exclusive_lock
from pipeline.train.local import train_here
from schemas.base import Strict
from schemas.errors import UserError
from schemas.extract import ExtractConfig
from schemas.run import RunConfig
from schemas.validation import validate

DEFAULTS = Path(__file__).parent / "cifar10.yaml"


class Cifar10Config(Strict):
    """The experiment; jobs/experiments/cifar10.yaml has its defaults."""

    source: str | None = None
    """The zip of CIFAR-10's training images: train/CLASS/NAME.jpg."""
    work: str = "runs/cifar10"
    """Folder of all that is made."""
    held_out: Annotated[int, Field(ge=1)] = 500
    """Images of each class that nothing is trained on."""
    teacher: SelfDistillConfig = SelfDistillConfig()
    autoencoder: AutoencoderConfig = AutoencoderConfig()
    judge: ClassifierConfig = ClassifierConfig()
    store: dict[str, Any] = Field(default={})
    """Options of the extraction."""
    run: dict[str, Any] = Field(default={})
    """Options of every training run."""
    arms: dict[str, dict[str, Any]] = Field(default={})
    """Options of the runs that are compared, by name."""
    seeds: tuple[int, ...] = (0,)
    """Each arm is trained once with each."""
    select: tuple[str, ...] = ()
    """Only these arms are trained by this call; default: all."""
    threads: Annotated[int, Field(ge=1)] = 4
    """Threads that decode images for the extraction."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute."""


def main(argv: list[str]) -> int:
    if "--config" not in argv and not any(part.startswith("--config=") for part in argv):
        argv = ["--config", str(DEFAULTS), *argv]
    config = parse_options(
        Cifar10Config,
        argv,
        command="python jobs/experiments/cifar10.py",
        about="Compare HASTE, its parts and its controls on CIFAR-10.",
    )
    print(run_matrix(config))
    return 0


def run_matrix(config: Cifar10Config) -> Path:
    """Make what is missing, train what is not trained; returns the outcome's file. Raises
    ``UserError``."""
    if config.source is None:
        raise UserError("--source is missing: the zip of CIFAR-10's training images")
    unknown = [name for name in config.select if name not in config.arms]
    if unknown:
        raise UserError(f"--select {unknown[0]}: the arms are {', '.join(config.arms)}")
    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    work = Path(config.work).expanduser().absolute()
    drawn = _check(config, work)
    shared, facts = _ingredients(config, work, device, drawn)
    runs = [
        _run_config(config, work, shared, arm, seed) for seed in config.seeds for arm in config.arms
    ]
    for run in runs:
        arm = run.name.rpartition("-seed")[0]
        if config.select and arm not in config.select:
            continue
        say(f"run {run.name}")
        what = f"the run '{run.name}' in --work '{work}'"
        remedy = "share the runs by --select and --seeds"
        with exclusive_lock(work / "running" / run.name, what=what, remedy=remedy):
            train_here(run, work / "runs" / run.name, ProcessGroup(device=torch.device(device)))
    sampler = runs[0].samples.sampler.in_force.model_dump(mode="json")
    facts["evaluation"]["sampling"] = {"sampler": sampler, "labels": "random"}
    return write_outcome(work, [run.name for run in runs], facts)


def _check(config: Cifar10Config, work: Path) -> int:
    """Everything that the options alone can get wrong, before hours of training: how many images
    every evaluation of a run draws. Raises ``UserError``."""
    _extraction(config, work, work, work, work)
    somewhere = {"network": config.judge.name, "network_weights": "random", "reference": "-"}
    shared = {"store": "-", "samples": {"evaluate": somewhere}}
    runs = [_run_config(config, work, shared, arm, 0) for arm in config.arms]
    if not runs:
        raise UserError("there are no arms: name some in the table 'arms' of --config")
    if not config.seeds:
        raise UserError("--seeds is empty: name numbers such as 0,1,2")
    for arm, run in zip(config.arms, runs, strict=True):
        if run.samples != runs[0].samples:
            raise UserError(
                f"the arm '{arm}' has options samples.* of its own: arms that are drawn or judged "
                "in different ways cannot be compared"
            )
    images = runs[0].samples.evaluate.images
    if images is None:
        raise UserError("run.samples.evaluate.images is missing: how many samples are judged")
    return images


def _ingredients(
    config: Cifar10Config, work: Path, device: str, drawn: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options that all runs share, and what was measured of what they are made of."""
    shelf = ArtifactCache(work)
    held = {"held_out": config.held_out}
    pictures, about_images = shelf.get(
        "images", held, lambda folder: unpack(str(config.source), config.held_out, folder)
    )
    train, rest = read_images(pictures / "train"), read_images(pictures / "held_out")
    teacher, about_teacher = shelf.get(
        "teacher",
        held | dumped(config.teacher),
        lambda folder: make_teacher(folder, train, rest, config.teacher, device),
    )
    autoencoder, about_autoencoder = shelf.get(
        "autoencoder",
        held | dumped(config.autoencoder),
        lambda folder: make_autoencoder(folder, train, config.autoencoder, device),
    )
    judge, about_judge = shelf.get(
        "judge",
        held | dumped(config.judge),
        lambda folder: make_judge(folder, train, rest, config.judge, device),
    )
    say("the store")
    store = complete_store(
        shelf,
        _extraction(config, pictures / "train", work / "store", teacher, autoencoder),
        device,
        config.threads,
    )
    judged = judged_by(judge, config.judge)
    reference, about_reference = shelf.get(
        "reference",
        held | dumped(config.judge) | {"images": drawn},
        lambda folder: make_reference(
            folder, pictures / "train", pictures / "held_out", judged, drawn, device
        ),
    )
    evaluation = {**judged, "reference": str(reference / "reference.npz"), "seed": JUDGE_SEED}
    facts = {
        "device": torch.cuda.get_device_name() if device == "cuda" else "CPU",
        "torch": torch.__version__,
        "images": about_images,
        "teacher": about_teacher,
        "autoencoder": about_autoencoder,
        "judge": about_judge,
        "reference": about_reference,
        "run": config.run,
        "evaluation": {
            "network": config.judge.name,
            "samples": drawn,
            "weights": "ema",
            "reference_sha256": digest_of_reference(reference, judged),
        },
    }
    return {"store": store.url, "samples": {"evaluate": evaluation}}, facts


def _extraction(
    config: Cifar10Config, source: Path, store: Path, teacher: Path, autoencoder: Path
) -> ExtractConfig:
    backbone = config.teacher.backbone
    sizes = backbone.model_dump(exclude={"name", "img_size", "init_values"})
    values = {
        "dataset": "folder",
        "source": str(source),
        "store": str(store),
        "resolution": RESOLUTION,
        "cut": "activations",
        "precision": "float32",
        "autoencoder": str(autoencoder),
        "teacher": {
            "model": backbone.name,
            "weights": str(teacher / "teacher.safetensors"),
            "image_size": backbone.img_size,
            "model_args": sizes,
        },
    }
    return validate(ExtractConfig, merge(values, config.store), where="the table 'store'")


def _run_config(
    config: Cifar10Config, work: Path, shared: dict[str, Any], arm: str, seed: int
) -> RunConfig:
    own = {"name": f"{arm}-seed{seed}", "seed": seed, "output": str(work / "runs")}
    values = merge(merge(merge(config.run, config.arms[arm]), shared), own)
    return validate(RunConfig, values, where=f"the arm '{arm}'")


if __name__ == "__main__":
    run_command(main)
