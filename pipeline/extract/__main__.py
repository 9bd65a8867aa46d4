"""`python -m pipeline.extract --dataset imagenet --source DIR --store URL`."""

from __future__ import annotations

import logging

from pipeline.cli.command import run_command
from pipeline.cli.next_step import log_next, training_beside
from pipeline.cli.options import parse_options
from pipeline.cost_estimate import wants_plan
from schemas.extract import PRESETS, ExtractConfig

logger = logging.getLogger("pipeline.extract")

ABOUT = """\
Run the teacher and the autoencoder once over a data set and write their outputs to a sharded store.
The same command resumes an interrupted extraction: only missing shards are made. --plan prints the
cost of every cut instead; --plan --help lists its options."""

FIRST = (
    *("dataset", "source", "store", "resolution", "teacher.model", "teacher.weights"),
    *("teacher.image_size", "autoencoder", "cut", "layers", "codec", "on_bad_image"),
    *("shard_size", "actors", "ray_address"),
)
"""Options of the short help."""


def main(argv: list[str]) -> int:
    if wants_plan(argv):
        from pipeline.cost_estimate.command import plan_extraction

        return plan_extraction(argv)
    config = parse_options(
        ExtractConfig,
        argv,
        command="python -m pipeline.extract",
        about=ABOUT,
        presets=PRESETS,
        preset_key="dataset",
        first=FIRST,
    )
    from pipeline.extract.job import extract  # Ray takes a second to import
    from pipeline.store.captions import caption_lines
    from pipeline.text import counted

    summary = extract(config)
    store = summary.store
    index = store.index()
    samples = sum(index.samples_per_shard)
    if summary.images == 0:
        print(f"nothing to do: {store.shown_url} has all {samples} samples")
    else:
        print(
            f"{store.shown_url} is complete: {samples} samples in {store.manifest.num_shards} "
            f"shards; {summary.images} encoded at {summary.images_per_second:.1f} images/s"
        )
    for line in caption_lines(store.manifest):
        print(line)
    if store.manifest.skipped:
        skipped = counted(len(store.manifest.skipped), "bad image was", "bad images were")
        print(f"{skipped} skipped; the manifest lists them")
    if (train := training_beside(store.url)) is not None:
        log_next("the training", "jobs/train_haste.py", "--config", train)
    else:
        log_next("configs that it can train", "pipeline.inspect", store.shown_url, "--check")
        options = ("--config", "CONFIG.yaml", "--store", store.shown_url)
        log_next("with one of them", "jobs/train_haste.py", *options)
    return 0


if __name__ == "__main__":
    run_command(main)
