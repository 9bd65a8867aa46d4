"""`--plan` of the two jobs: from options to a table or one line of JSON."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from typing import get_args

import torch

from pipeline.cli.config_files import read_yaml
from pipeline.cli.options import parse_options
from pipeline.cost_estimate import FLAG
from pipeline.cost_estimate.costs import GIGA, Demand, Stored, Work, cost_of
from pipeline.cost_estimate.device_rates import Device, assumed_gpu, given_device, measure_device
from pipeline.cost_estimate.flops import teacher_flops, work
from pipeline.cost_estimate.meta_models import Drafts, Geometry, draft
from pipeline.cost_estimate.report import ONLINE, Here, Plan, advise, as_json, describe
from pipeline.cost_estimate.sizes import CROP_CODEC, SHOWN, codec_set, latent_bytes, stored_bytes
from pipeline.datasets import list_images
from pipeline.storage.files import absolute_url
from pipeline.store import Store
from schemas.alignment import AlignmentConfig, FixedStep
from schemas.errors import UserError
from schemas.extract import PRESETS, Cut, ExtractConfig, TeacherConfig
from schemas.plan import ExtractPlan, PlanOptions, TrainPlan
from schemas.run import RunConfig
from schemas.validation import validate

CUTS: tuple[Cut, ...] = get_args(Cut)
IMAGENET_IMAGES = 1_281_167  # ILSVRC 2012's training set
DEFAULT_TRAINER = RunConfig(
    name="sit_xl2_haste",
    steps=500_000,
    alignment=AlignmentConfig(termination=FixedStep(step=250_000)),
)
ABOUT = """\
Say what every cut of the teacher would cost, in bytes, time and money, and which to take. Times a
few batches on this machine; where it has no GPU costs are for an assumed one. Reads no image, loads
no weights, writes nothing."""


def plan_extraction(argv: list[str]) -> int:
    """``python -m pipeline.extract --plan``."""
    config = parse_options(
        ExtractPlan,
        _without_flag(argv),
        command="python -m pipeline.extract --plan",
        about=ABOUT,
        presets=PRESETS,
        preset_key="dataset",
    )
    trainer = config.plan.trainer
    run = DEFAULT_TRAINER
    if trainer is not None:
        run = validate(RunConfig, read_yaml(trainer), where=trainer)
    plan = make_plan(config, run, config.plan, config.plan.images)
    return _show(plan, config.as_json)


def plan_training(argv: list[str]) -> int:
    """``jobs/train_haste.py --plan``."""
    config = parse_options(
        TrainPlan,
        _without_flag(argv),
        command="python jobs/train_haste.py --plan",
        about=ABOUT,
        presets=PRESETS,
        preset_key="extract.dataset",
    )
    extraction, images, existing = config.extract, config.images, None
    if config.store is not None:
        store = Store.open(absolute_url(config.store))
        store.require_complete()
        samples = sum(store.index().samples_per_shard)
        extraction, existing = _extraction_of(store), _existing(store, samples)
        images = images or samples
    plan = make_plan(extraction, config, config.plan, images, existing)
    return _show(plan, config.as_json)


def make_plan(
    config: ExtractConfig,
    run: RunConfig,
    options: PlanOptions,
    images: int | None = None,
    existing: Stored | None = None,
) -> Plan:
    """Raises ``UserError`` where the run could not be trained on such a store."""
    if not run.alignment.active:
        raise UserError("this run aligns to no teacher: there is nothing to plan")
    images = images or _count_images(config)
    drafts = draft(config)
    _check_fit(config, run, drafts.geometry)
    device, here = _devices(config, run, options, drafts)
    demand = _demand(config, run, options, images, device)
    totals = work(drafts, run)
    ways = candidate_layouts(config, drafts.geometry)
    if existing is not None:
        ways.insert(0, existing)
    return Plan(
        config=config,
        run=run,
        device=device,
        demand=demand,
        work=totals,
        advice=advise(ways, totals, device.rates, demand),
        here=None if here is None else _here(here, ways, totals, config, demand),
        notes=(*drafts.notes, *_caveats(config, run, device, here)),
    )


def candidate_layouts(config: ExtractConfig, geometry: Geometry) -> list[Stored]:
    """Every cut in the chosen codecs, which are the candidates, and in others for comparison."""
    latents = latent_bytes(geometry)
    ways = []
    for cut in CUTS:
        for codec in (config.codec,) if cut == ONLINE else dict.fromkeys((config.codec, *SHOWN)):
            size = latents + stored_bytes(cut, codec, geometry, compress=config.compress)
            shown = CROP_CODEC if cut == ONLINE else codec
            ways.append(Stored(cut, shown, size, candidate=codec == config.codec))
    return ways


def aligned_steps(run: RunConfig) -> int:
    """Steps with alignment; the most that there can be where a trigger will decide."""
    termination = run.alignment.termination
    if isinstance(termination, FixedStep) and not termination.dry:
        return min(termination.step, run.steps)
    return run.steps


def _devices(
    config: ExtractConfig, run: RunConfig, options: PlanOptions, drafts: Drafts
) -> tuple[Device, Device | None]:
    """The device that costs are for, and this machine's where it was timed."""
    given = options.autoencoder_tflops
    if options.tflops is not None:
        return given_device(options.tflops, given, config.resolution), None
    print("timing a few batches on this machine", file=sys.stderr)
    flops = teacher_flops(drafts.vit, drafts.geometry)
    if options.device == "cpu" or torch.cuda.is_available():
        gpu = options.device != "cpu"
        here = measure_device(config, run, drafts, flops, given, gpu=gpu)
        return here, here
    here = measure_device(config, run, drafts, flops, gpu=False)
    return assumed_gpu(given, config.resolution), here


def _here(
    device: Device, ways: list[Stored], totals: Work, config: ExtractConfig, demand: Demand
) -> Here:
    """What an extraction on this machine would take."""
    demand = replace(demand, encoders=_encoders(config, device))
    hours = {
        way.cut: cost_of(way, totals, device.rates, demand).extraction_hours
        for way in ways
        if way.candidate and not way.exists
    }
    return Here(device, hours)


def _demand(
    config: ExtractConfig, run: RunConfig, options: PlanOptions, images: int, device: Device
) -> Demand:
    price = options.prices.device_hour
    if price is None:
        price = 0.05 * device.cores if device.kind == "cpu" else 3.0
    return Demand(
        images=images,
        aligned_images=aligned_steps(run) * run.global_batch,
        run_images=run.steps * run.global_batch,
        encoders=_encoders(config, device),
        trainers=run.workers.count,
        bytes_per_second=options.gb_per_second * GIGA,
        device_hour=price,
        tb_month=options.prices.tb_month,
        months=options.months,
        runs=options.runs,
    )


def _encoders(config: ExtractConfig, device: Device) -> float:
    """Devices that the extraction has; a CPU's actors are parts of it."""
    if device.kind == "cpu" and config.actors is not None:
        return config.actors * (config.cpus_per_actor or 1) / device.cores
    return config.actors or 1


def _count_images(config: ExtractConfig) -> int:
    if config.source is not None or config.dataset == "demo":
        return len(list_images(config).items)
    if config.dataset == "imagenet":
        return IMAGENET_IMAGES
    raise UserError(
        f"a plan for --dataset {config.dataset} needs --source to count its images, or their "
        "number: --plan.images"
    )


def _check_fit(config: ExtractConfig, run: RunConfig, geometry: Geometry) -> None:
    if geometry.latent_shape != run.student.latent_shape:
        made, wanted = (
            "x".join(map(str, shape)) for shape in (geometry.latent_shape, run.student.latent_shape)
        )
        raise UserError(
            f"the store would hold latents {made} of {config.resolution} px images; the trainer's "
            f"{run.student.model} expects {wanted}: plan for another trainer or resolution"
        )
    lacking = sorted(set(run.alignment.teacher_layers) - set(config.layers))
    if run.alignment.attention_weight and lacking:
        raise UserError(
            f"the trainer's alignment.teacher_layers asks for teacher layer {lacking[0]}; "
            f"the extraction's --layers keeps {', '.join(map(str, config.layers))}"
        )


def _caveats(
    config: ExtractConfig, run: RunConfig, device: Device, here: Device | None
) -> tuple[str, ...]:
    notes = []
    if device.kind == "cpu":
        notes.append(
            "timed on a CPU, whose hours are priced as such: to plan for a GPU leave out "
            "--plan.device cpu or give --plan.tflops (200 to 300 for an H100)"
        )
    if config.column_codecs:
        notes.append("--column-codecs are not weighed: sizes are of --codec alone")
    if (here or device).estimated:
        notes.append(
            "* the teacher does not fit this machine: its time follows from its FLOPs at the rate "
            "that two of its blocks reached"
        )
    termination = run.alignment.termination
    if aligned_steps(run) == run.steps and not (
        isinstance(termination, FixedStep) and not termination.dry
    ):
        notes.append("no step is fixed for the termination: all steps are taken to be aligned")
    return tuple(notes)


def _extraction_of(store: Store) -> ExtractConfig:
    """The extraction that made a store, as far as a plan asks."""
    manifest = store.manifest
    _, stream = manifest.teacher_stream()
    teacher = stream.teacher
    values = {
        "dataset": manifest.dataset.name,
        "resolution": manifest.resolution,
        "teacher": TeacherConfig(
            model=teacher.model, model_args=teacher.model_args, image_size=teacher.image_size
        ),
        "autoencoder": manifest.autoencoder.name,
        "layers": teacher.layers,
        "batch_size": stream.compute.batch_size,
        "precision": "auto",
    }
    return ExtractConfig.model_validate(values)


def _existing(store: Store, samples: int) -> Stored:
    """A complete store, at the size that it has."""
    _, stream = store.manifest.teacher_stream()
    if not samples:
        raise UserError(f"store '{store.shown_url}' holds no samples")
    size = -(-sum(store.index().bytes_per_stream.values()) // samples)
    codec = codec_set(stream)
    return Stored(stream.cut, codec, size, exists=True)


def _without_flag(argv: list[str]) -> list[str]:
    return [argument for argument in argv if argument != FLAG]


def _show(plan: Plan, json_wanted: bool) -> int:
    print(json.dumps(as_json(plan)) if json_wanted else describe(plan))
    return 0
