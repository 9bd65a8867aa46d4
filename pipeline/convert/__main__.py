"""`python -m pipeline.store convert A B`."""

from __future__ import annotations

import sys

from pipeline.cli.command import run_command
from pipeline.cli.options import parse_options
from schemas.convert import ConvertConfig
from schemas.errors import UserError

USAGE = """\
usage: python -m pipeline.store convert SOURCE TARGET [--option VALUE ...]

`convert --help` lists its options. To look at a store: python -m pipeline.inspect STORE"""

ABOUT = """\
Re-encode a complete store to another format, a coarser codec or a later cut of the teacher. The
teacher itself is not needed; what cannot be had without it is refused. Run it again after an
interruption: it does only what is missing. Latents, labels and keys are copied as they are."""


def main(argv: list[str]) -> int:
    if not argv or argv[0] in {"-h", "--help"}:
        print(USAGE)
        return 0
    if argv[0] != "convert":
        raise UserError(f"unknown command '{argv[0]}': there is only 'convert'; see --help")
    config = parse_options(
        ConvertConfig,
        argv[1:],
        command="python -m pipeline.store convert",
        about=ABOUT,
        positional=("source", "target"),
    )
    from pipeline.convert import convert  # it knows of teachers, of which a store knows nothing

    done = convert(config)
    store = done.store
    samples = sum(store.index().samples_per_shard)
    state = "is complete" if done.shards else "was complete already"
    print(
        f"{store.shown_url} {state}: {samples} samples in {store.manifest.num_shards} shards; "
        f"{done.bytes_before:.0f} bytes per image before, {done.bytes_after:.0f} after"
    )
    sys.stdout.flush()
    return 0


if __name__ == "__main__":
    run_command(main)
