"""`--plan` of extraction and training: from options to a table or one line of JSON."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, TypeVar

from pipeline.cli.config_files import read_yaml
from pipeline.cli.options import parse_options
from pipeline.cost_estimate import FLAG
from pipeline.storage.files import absolute_url
from schemas.alignment import AlignmentConfig, FixedStep
from schemas.extract import PRESETS
from schemas.plan import ExtractPlan, TrainPlan
from schemas.run import RunConfig
from schemas.validation import validate

if TYPE_CHECKING:
    from pipeline.cost_estimate.report import Estimate

DEFAULT_TRAINER = RunConfig(
    name="sit_xl2_haste",
    steps=500_000,
    alignment=AlignmentConfig(termination=FixedStep(step=250_000)),
)
DESCRIPTION = """\
Print the cost of every cut of the teacher in bytes, time and money, and recommend one. Times a few
batches on this machine's GPU; without a GPU, costs are for an assumed one. Reads no images, loads
no weights, writes nothing."""

Options = TypeVar("Options", ExtractPlan, TrainPlan)


def plan_extraction(argv: list[str]) -> int:
    """``python -m pipeline.extract --plan``."""
    config = _parse(ExtractPlan, argv, "python -m pipeline.extract --plan", preset_key="dataset")
    trainer, run = config.plan.trainer, DEFAULT_TRAINER
    if trainer is not None:
        run = validate(RunConfig, read_yaml(trainer), where=trainer)
    from pipeline.cost_estimate.estimate import make_estimate  # torch takes seconds to import

    return _print(make_estimate(config, run, config.plan, config.plan.images), config)


def plan_training(argv: list[str]) -> int:
    """``jobs/train_haste.py --plan``."""
    command = "python jobs/train_haste.py --plan"
    config = _parse(TrainPlan, argv, command, preset_key="extract.dataset")
    return _print(estimate_training(config, memory=True), config)


def estimate_training(config: TrainPlan, *, memory: bool = False) -> Estimate:
    """The costs of every cut for a run, and if it has a store, of that. ``memory``: also that of a
    step. Raises ``UserError``."""
    from pipeline.checkpoints.store_identity import with_text
    from pipeline.store import Store

    store = None if config.store is None else Store.open(absolute_url(config.store))
    # torch takes seconds to import
    from pipeline.cost_estimate.estimate import existing_layout, extraction_config, make_estimate

    extraction, images, existing = config.extract, config.images, None
    if store is not None:
        store.require_complete()
        samples = sum(store.index().samples_per_shard)
        extraction, existing = extraction_config(store), existing_layout(store, samples)
        if config.student.family == "MMDiT":
            config = with_text(config, store.manifest, config.diffusion.text_stream)
        images = images or samples
    return make_estimate(extraction, config, config.plan, images, existing, memory=memory)


def _parse(model: type[Options], argv: list[str], command: str, *, preset_key: str) -> Options:
    return parse_options(
        model,
        [argument for argument in argv if argument != FLAG],
        command=command,
        about=DESCRIPTION,
        presets=PRESETS,
        preset_key=preset_key,
    )


def _print(estimate: Estimate, config: ExtractPlan | TrainPlan) -> int:
    from pipeline.cost_estimate.report import as_json, describe

    currency = config.plan.prices.currency
    made = as_json(estimate, currency) if config.as_json else None
    print(describe(estimate, currency, wide=config.wide) if made is None else json.dumps(made))
    return 0
