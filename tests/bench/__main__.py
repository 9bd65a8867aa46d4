"""`python -m tests.bench NAME [--json] [--option VALUE ...]`."""

from __future__ import annotations

import importlib
import json

from pipeline.cli.command import run_command
from pipeline.cli.options import parse_options
from schemas.errors import UserError
from schemas.validation import suggest
from tests.bench.options import OPTIONS

BENCHES = {
    "frontier": "cut x codec: bytes, errors of targets and gradients, decoding time",
    "calibration": "fixed steps and steps chosen by a calibration, on four kinds of weights",
    "backends": "tars and zarr, on disk and on S3: MB/s of writing and reading",
    "step": "a training step in Phase I and II against a step without alignment",
    "loader": "the loader on one core against readinto and against stock webdataset",
    "sampling": "CPU work of a sampling step, with a student of no cost, against another build",
    "pixels": "difference of sampled pixels by arithmetic: bfloat16 and compiled against float32",
    "evaluation": "FID and precision/recall against torch-fidelity on the same features",
    "extract": "an encoder, from JPEG files to shards, against its two networks alone",
    "optimizer": "AdamW and the weights' average, fused against plain",
    "attention": "the attention loss, forward and backward, fused against plain",
    "arithmetic": "kernels, bytes and predicted times of a step on an H100, counted on the CPU",
    "table": "step, loader, extract, optimizer and attention in one run of ten minutes at most",
    "growth": "1.3 and 100 million samples: time to open, order and read a first batch; memory",
    "shuffle": "label entropy of batches by shuffle window, against a full shuffle",
    "checkpoint": "time that a training loses by a checkpoint, and memory",
    "resume": "time from a resumed run's start to its first step, and memory",
    "commands": "help, complaints and first results of commands: time and memory",
    "scaling": "workers through Ray against plain processes; the driver's CPU per 1,000 shards",
}
"""Modules of this package, each with ``run(options) -> Report``; their options are in
``tests.bench.options``."""


def main(argv: list[str]) -> int:
    if not argv or argv[0] in {"-h", "--help"}:
        print("usage: python -m tests.bench NAME [--json] [--option VALUE ...]\n")
        print("\n".join(f"  {name:10} {description}" for name, description in BENCHES.items()))
        return 0 if argv else 2
    name, *rest = argv
    if name not in BENCHES:
        raise UserError(f"there is no bench '{name}'{suggest(name, list(BENCHES))}; --help")
    command = f"python -m tests.bench {name}"
    options = parse_options(OPTIONS[name], rest, command=command, about=BENCHES[name])
    # torch takes seconds to import
    from tests.bench.report import as_json, page

    report = importlib.import_module(f"tests.bench.{name}").run(options)
    print(json.dumps(as_json(name, report)) if options.as_json else page(report))
    return 0


if __name__ == "__main__":
    run_command(main)
