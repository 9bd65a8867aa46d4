"""The experiment of ``cifar10.py``: its artifacts, and a run of every arm with every seed.

A teacher is self-distilled on the training images without labels; an autoencoder and the evaluation
classifier are trained on the same images. Then every arm trains on one store, with equal steps and
seeds, and is evaluated at several steps by the Fréchet distance on the classifier's features. The
same command resumes an interrupted experiment. It runs in one plain process without a cluster; with
--select and --seeds several processes share the runs once the artifacts are made.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

from jobs.experiments.artifacts import (
    EVALUATION_SEED,
    REFERENCE_FILE,
    RESOLUTION,
    ArtifactCache,
    complete_store,
    digest_of_reference,
    evaluation_network,
    make_autoencoder,
    make_classifier,
    make_reference,
    make_teacher,
    read_images,
    unpack,
)
from jobs.experiments.options import Cifar10Config, check_options
from jobs.experiments.results import write_results
from pipeline.cli.config_files import merge
from pipeline.distributed.process_group import ProcessGroup
from pipeline.precision import choose_device
from pipeline.storage.locks import exclusive_lock
from pipeline.train.local import train_here
from schemas.errors import UserError
from schemas.extract import ExtractConfig
from schemas.run import RunConfig
from schemas.validation import validate

logger = logging.getLogger("jobs.cifar10")


def run_matrix(config: Cifar10Config) -> Path:
    """Make the missing artifacts and train the missing runs; returns the path of the result table.
    Raises ``UserError``."""
    check_options(config)
    device = choose_device(config.device)
    work = Path(config.work).expanduser().absolute()
    num_samples = _check(config, work)
    shared, facts = _make_artifacts(config, work, device, num_samples)
    runs = [
        _run_config(config, work, shared, arm, seed) for seed in config.seeds for arm in config.arms
    ]
    for run in runs:
        arm = run.name.rpartition("-seed")[0]
        if config.select and arm not in config.select:
            continue
        logger.info("run %s", run.name)
        what = f"the run '{run.name}' in --work '{work}'"
        remedy = "share the runs by --select and --seeds"
        with exclusive_lock(work / "running" / run.name, what=what, remedy=remedy):
            train_here(run, work / "runs" / run.name, ProcessGroup(device=torch.device(device)))
    sampler = runs[0].samples.sampler.in_force.model_dump(mode="json")
    facts["evaluation"]["sampling"] = {"sampler": sampler, "labels": "random"}
    return write_results(work, [run.name for run in runs], facts)


def _check(config: Cifar10Config, work: Path) -> int:
    """Validate all options before hours of training; returns the number of samples per evaluation.
    Raises ``UserError``."""
    _extraction(config, work, work, work, work)
    placeholder = {"network": config.judge.name, "network_weights": "random", "reference": "-"}
    shared = {"store": "-", "samples": {"evaluate": placeholder}}
    runs = [_run_config(config, work, shared, arm, 0) for arm in config.arms]
    if not runs:
        raise UserError("there are no arms: name some in the table 'arms' of --config")
    if not config.seeds:
        raise UserError("--seeds is empty: name numbers such as 0,1,2")
    for arm, run in zip(config.arms, runs, strict=True):
        if run.samples != runs[0].samples:
            raise UserError(
                f"the arm '{arm}' has options samples.* of its own: arms that are sampled or "
                "evaluated in different ways cannot be compared"
            )
    images = runs[0].samples.evaluate.images
    if images is None:
        raise UserError(
            "run.samples.evaluate.images is missing: the number of samples per evaluation"
        )
    return images


def _make_artifacts(
    config: Cifar10Config, work: Path, device: str, num_samples: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options that all runs share, and the facts of the results: measurements of the artifacts and
    the settings of the evaluation."""
    cache = ArtifactCache(work)
    held_out_option = {"held_out": config.held_out}
    images, images_report = cache.get(
        "images",
        held_out_option,
        lambda folder: unpack(str(config.source), config.held_out, folder),
    )
    train, held_out = read_images(images / "train"), read_images(images / "held_out")
    teacher, teacher_report = cache.get(
        "teacher",
        held_out_option | config.teacher.model_dump(mode="json"),
        lambda folder: make_teacher(folder, train, held_out, config.teacher, device),
    )
    autoencoder, autoencoder_report = cache.get(
        "autoencoder",
        held_out_option | config.autoencoder.model_dump(mode="json"),
        lambda folder: make_autoencoder(folder, train, config.autoencoder, device),
    )
    classifier_options = held_out_option | config.judge.model_dump(mode="json")
    classifier, classifier_report = cache.get(
        "judge",
        classifier_options,
        lambda folder: make_classifier(folder, train, held_out, config.judge, device),
    )
    logger.info("extracting the store")
    store = complete_store(
        cache,
        _extraction(config, images / "train", work / "store", teacher, autoencoder),
        device,
        config.threads,
    )
    network = evaluation_network(classifier, config.judge)
    reference, reference_report = cache.get(
        "reference",
        classifier_options | {"images": num_samples},
        lambda folder: make_reference(
            folder, images / "train", images / "held_out", network, num_samples, device
        ),
    )
    evaluation = {
        **network,
        "reference": str(reference / REFERENCE_FILE),
        "seed": EVALUATION_SEED,
    }
    facts = {
        "device": torch.cuda.get_device_name() if device == "cuda" else "CPU",
        "torch": torch.__version__,
        "images": images_report,
        "teacher": teacher_report,
        "autoencoder": autoencoder_report,
        "judge": classifier_report,
        "reference": reference_report,
        "run": config.run,
        "evaluation": {
            "network": config.judge.name,
            "samples": num_samples,
            "weights": "ema",
            "reference_sha256": digest_of_reference(reference, network),
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
