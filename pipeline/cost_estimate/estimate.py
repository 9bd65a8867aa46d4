"""The estimate of ``--plan`` from the options of an extraction and of a run."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import get_args

import torch

from pipeline.cost_estimate.costs import (
    CALIBRATION_PASSES,
    GIGA,
    HOUR,
    ONLINE,
    ImageFlops,
    Scenario,
    StoreLayout,
    caption_bytes,
    class_stream_bytes,
    compare_layouts,
    latent_bytes,
    stored_bytes,
)
from pipeline.cost_estimate.device_rates import Device, measure_device, unmeasured_device
from pipeline.cost_estimate.flops import image_flops
from pipeline.cost_estimate.memory import step_memory
from pipeline.cost_estimate.meta_models import (
    Geometry,
    MetaModels,
    build_meta_models,
    writes_class_stream,
)
from pipeline.cost_estimate.report import Estimate
from pipeline.datasets import COCO, list_images
from pipeline.store import Store
from pipeline.targets.cuts import codec_set_of, stepped_columns
from pipeline.text import describe_bytes, describe_hours
from pipeline.text_encoders import encoder_size
from schemas.alignment import FixedStep
from schemas.codecs import CodecSet
from schemas.errors import UserError
from schemas.extract import Cut, ExtractConfig, TeacherConfig
from schemas.fields import element_count
from schemas.plan import PlanOptions
from schemas.run import RunConfig

logger = logging.getLogger(__name__)

COMPARED_CODECS: tuple[CodecSet, ...] = ("faithful", "small", "float16")
"""Codec sets shown in every estimate, in addition to that of ``--codec``."""
IMAGENET_IMAGES = 1_281_167  # training set of ILSVRC 2012
COCO_IMAGES = {"train": 82_783, "val": 40_504}
USUAL_CAPTIONS = 5.0
"""Captions of an image of MS-COCO."""


def make_estimate(
    config: ExtractConfig,
    run: RunConfig,
    options: PlanOptions,
    images: int | None = None,
    existing: StoreLayout | None = None,
    *,
    memory: bool = False,
) -> Estimate:
    """``memory``: also count that of a step. Raises ``UserError`` where the run cannot be trained
    on such a store."""
    if not run.alignment.active:
        raise UserError("this run has no alignment: there is nothing to estimate")
    captions = USUAL_CAPTIONS if config.dataset in COCO else 0.0
    if images is None:
        images, captions = _count_images(config)
    if existing is None:
        run = _with_text(config, run, captions)
    models = build_meta_models(config)
    _check_compatible(config, run, models.geometry)

    device = _device(config, run, options, models)
    with_class = writes_class_stream(config, models.geometry)
    flops = image_flops(models, run, class_token=with_class)
    scenario = _scenario(config, run, options, images, device)
    layouts = candidate_layouts(config, models.geometry, captions)
    if existing is not None:
        layouts.insert(0, existing)
    costs = compare_layouts(layouts, flops, device.rates, scenario)
    notes = (*models.notes, *_notes(config, run), *_class_notes(costs[0].class_bytes))
    notes = (*notes, *_caption_notes(config, captions))
    notes = (*notes, *_calibration_notes(config, images, flops, device))
    needed = None
    if memory:
        logger.info("counting what a step keeps for its backward pass")
        tail = flops.tail_weights.get(existing.cut if existing else config.cut, 0)
        needed = step_memory(run, models.geometry, tail)
    return Estimate(config, run, device, scenario, flops, costs, notes, needed)


def candidate_layouts(
    config: ExtractConfig, geometry: Geometry, captions: float = 0.0
) -> list[StoreLayout]:
    """Every cut in the requested codec (the candidates) and in others for comparison; ``captions``
    are those of an image, on average."""
    latents = latent_bytes(geometry)
    if captions:
        of_encoder = encoder_size(config.text)
        latents += caption_bytes(config.text, of_encoder, captions, compress=config.compress)
    layouts = []
    for cut in get_args(Cut):
        own = config.codec.name
        codecs = (own,) if cut == ONLINE else (own, *COMPARED_CODECS)
        for codec in dict.fromkeys(codecs):
            size = latents + stored_bytes(cut, codec, geometry, compress=config.compress)
            tokens = 0
            if writes_class_stream(config, geometry):
                tokens = class_stream_bytes(codec, geometry, compress=config.compress)
            name = "uint8" if cut == ONLINE else codec
            layouts.append(StoreLayout(cut, name, size, tokens, candidate=codec == own))
    return layouts


def aligned_steps(run: RunConfig) -> int:
    """Steps with alignment: all of them unless the termination step is fixed."""
    termination = run.alignment.termination
    if isinstance(termination, FixedStep) and not termination.dry:
        return min(termination.step, run.steps)
    return run.steps


def _device(
    config: ExtractConfig, run: RunConfig, options: PlanOptions, models: MetaModels
) -> Device:
    gpu = options.device != "cpu" and torch.cuda.is_available()
    if options.tflops is None and (gpu or options.device == "cpu"):
        logger.info("timing a few batches on this machine")
        return measure_device(config, run, models, gpu=gpu)
    return unmeasured_device(options.tflops, config.resolution)


def _scenario(
    config: ExtractConfig, run: RunConfig, options: PlanOptions, images: int, device: Device
) -> Scenario:
    price = options.prices.device_hour
    if price is None:
        price = 0.05 * device.cores if device.kind == "cpu" else 3.0
    return Scenario(
        images=images,
        aligned_images_per_run=aligned_steps(run) * run.global_batch,
        images_per_run=run.steps * run.global_batch,
        encoders=_encoders(config, device),
        workers=run.workers.count,
        bytes_per_second_per_worker=round(options.gb_per_second * GIGA),
        device_hour=price,
        tb_month=options.prices.tb_month,
        months=options.months,
        runs=options.runs,
    )


def _encoders(config: ExtractConfig, device: Device) -> float:
    """Devices of the extraction. On a CPU an actor is a fraction of a device."""
    if device.kind == "cpu" and config.actors is not None:
        return config.actors * (config.cpus_per_actor or 1) / device.cores
    return config.actors or 1


def _caption_notes(config: ExtractConfig, captions: float) -> tuple[str, ...]:
    """The price of captions in each form, which the layouts do not compare."""
    if not captions or config.text.keep == "none":
        return ()
    size = encoder_size(config.text)
    forms = {
        f"embeddings in {codec}": config.text.model_copy(
            update={"keep": "embeddings", "codec": codec}
        )
        for codec in dict.fromkeys((config.text.codec, "float16", "float32"))
    }
    forms["tokens"] = config.text.model_copy(update={"keep": "tokens"})
    sizes = ", ".join(
        f"{describe_bytes(caption_bytes(text, size, captions, compress=config.compress))} as {form}"
        for form, text in forms.items()
    )
    return (
        f"the {captions:.3g} captions of an image take {sizes} (with tokens the trainer runs the "
        f"text encoder); the sizes above include them as {config.text.keep or 'embeddings'}, not "
        "the time of the text encoder; a visit reads one caption, the read rates above count all",
    )


def _count_images(config: ExtractConfig) -> tuple[int, float]:
    """Images, and captions of an image on average."""
    if config.source is not None or config.dataset == "demo":
        listing = list_images(config)
        found = 0 if listing.captions is None else listing.captions.captions
        return len(listing.items), found / max(1, len(listing.items))
    if config.dataset == "imagenet":
        return IMAGENET_IMAGES, 0.0
    if config.dataset in COCO:
        return COCO_IMAGES[config.split or "train"], USUAL_CAPTIONS
    raise UserError(
        f"a plan for --dataset {config.dataset} needs --source to count its images, or their "
        "number: --plan.images"
    )


def _with_text(config: ExtractConfig, run: RunConfig, captions: float) -> RunConfig:
    """The run with the sizes of the captions in its student. Raises ``UserError`` where a student
    that reads captions gets none."""
    if run.student.family != "MMDiT":
        return run
    if not captions or config.text.keep == "none":
        raise UserError(
            f"{run.student.model} reads captions, and the store would hold none: plan a --dataset "
            "with captions, or name another run by --plan.trainer"
        )
    tokens, width = encoder_size(config.text)
    sizes = {"text_tokens": tokens, "text_width": width}
    for key, stored in sizes.items():
        if getattr(run.student, key) not in (None, stored):
            raise UserError(
                f"the trainer's student.{key} is {getattr(run.student, key)}, the captions of "
                f"{config.text.encoder} have {stored}: leave it out"
            )
    return run.model_copy(update={"student": run.student.model_copy(update=sizes)})


def _check_compatible(config: ExtractConfig, run: RunConfig, geometry: Geometry) -> None:
    if geometry.latent_shape != run.student.latent_shape:
        stored, expected = (
            "x".join(map(str, shape)) for shape in (geometry.latent_shape, run.student.latent_shape)
        )
        raise UserError(
            f"the store would hold latents {stored} of {config.resolution} px images; the "
            f"trainer's {run.student.model} expects {expected}: name the run's config by "
            "--plan.trainer, or another --resolution"
        )
    streams = [options for options in run.alignment.streams if options.attention_weight]
    needed = {layer for options in streams for layer in options.teacher_layers}
    missing = sorted(needed - set(config.layers))
    if missing:
        raise UserError(
            f"the trainer's alignment.teacher_layers needs teacher layer {missing[0]}; "
            f"the extraction's --layers stores {', '.join(map(str, config.layers))}"
        )


def _notes(config: ExtractConfig, run: RunConfig) -> Iterator[str]:
    if config.column_codecs:
        yield "--column-codecs are ignored: sizes are of --codec alone"
    if run.alignment.others:
        yield (
            "the run aligns to several streams: bytes are those of one, and its teacher stands for "
            "all"
        )
    termination = run.alignment.termination
    if not isinstance(termination, FixedStep) or termination.dry:
        yield "the termination step is not fixed: all steps are assumed to be aligned"


def _class_notes(each: int) -> Iterator[str]:
    if each:
        yield (
            f"sizes of all images include class tokens, {describe_bytes(each)} per image, which "
            "only recipes such as REG read; 'activations' and 'image' are extracted with all "
            "blocks of the teacher for them (--class-token none: neither)"
        )


STEPPED: dict[Cut, tuple[str, ...]] = {
    "activations": ("tokens",),
    "qk": ("features", "query", "key"),
    "maps": ("features", "attention"),
    "image": (),
}
"""Columns of each cut that are quantised in steps."""


def _calibration_notes(
    config: ExtractConfig, images: int, flops: ImageFlops, device: Device
) -> Iterator[str]:
    """The time of the calibration of the codec's steps, if one is made."""
    columns = stepped_columns(STEPPED[config.cut], config.column_codecs)
    if config.codec.promise is None or not columns:
        return
    count = config.codec.images(images)
    whole, later = flops.training[ONLINE], flops.training.get("activations", 0)
    work = count * (whole + 2 * CALIBRATION_PASSES * later)  # with and without the codec
    yield (
        f"the steps of codec '{config.codec.name}' are chosen before the extraction, on {count:,} "
        f"images: about {describe_hours(work / device.rates.teacher / HOUR)} on one device, not in "
        "the hours above; bytes are those of the fixed steps (--codec.calibration 0)"
    )


def extraction_config(store: Store) -> ExtractConfig:
    """The options that an estimate needs, from the manifest of a store."""
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


def existing_layout(store: Store, samples: int) -> StoreLayout:
    """Layout and measured size of a complete store; the codec of the largest tensor where the
    stream has no codec set."""
    if not samples:
        raise UserError(f"store '{store.shown_url}' holds no samples")
    _, stream = store.manifest.teacher_stream()
    largest = max(stream.columns.values(), key=lambda column: element_count(column.shape))
    sizes = store.index().bytes_per_stream
    tokens = sum(size for name, size in sizes.items() if name in store.manifest.class_streams)
    size = -(-(sum(sizes.values()) - tokens) // samples)
    codec = codec_set_of(stream) or largest.codec
    return StoreLayout(stream.cut, codec, size, -(-tokens // samples), exists=True)
