"""`python -m pipeline.convert SOURCE TARGET`."""

from __future__ import annotations

import logging
import sys

from pipeline.cli.command import run_command
from pipeline.cli.next_step import log_next
from pipeline.cli.options import parse_options
from pipeline.storage.redaction import redact
from schemas.convert import ConvertConfig

logger = logging.getLogger("pipeline.convert")

ABOUT = """\
Re-encode a complete store to another format, a coarser codec or a later cut of the teacher. Only
the teacher's tail in the store is used; a target that needs more of the teacher is refused. Run it
again after an interruption: only missing shards are converted. Latents, labels and keys are copied
unchanged.

To inspect a store: python -m pipeline.inspect STORE"""


def main(argv: list[str]) -> int:
    config = parse_options(
        ConvertConfig,
        argv,
        command="python -m pipeline.convert",
        about=ABOUT,
        positional=("source", "target"),
    )
    from pipeline.convert.request import open_source

    open_source(config)  # a missing store is reported before torch is imported, for seconds
    logger.info("conversion to '%s'", redact(str(config.target)))
    from pipeline.convert.job import convert

    done = convert(config)
    store = done.store
    samples = sum(store.index().samples_per_shard)
    state = "is complete" if done.shards else "was already complete"
    print(
        f"{store.shown_url} {state}: {samples} samples in {store.manifest.num_shards} shards; "
        f"{done.bytes_before:.0f} bytes per image before, {done.bytes_after:.0f} after"
    )
    sys.stdout.flush()
    log_next("its checksums", "pipeline.inspect", store.shown_url, "--verify")
    return 0


if __name__ == "__main__":
    run_command(main)
