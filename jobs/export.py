"""Write a checkpoint as a .pt file that SiT's, REPA's, HASTE's, REG's or iREPA's repository reads.

python jobs/export.py --checkpoint runs/demo --out demo.pt
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.checkpoints.resolve import find_checkpoint, local_copy
from pipeline.checkpoints.selection import is_weights_file
from pipeline.cli.command import run_command
from pipeline.cli.next_step import log_next
from pipeline.cli.options import parse_options
from schemas.errors import UserError
from schemas.export import ExportConfig


def main(argv: list[str]) -> int:
    config = parse_options(
        ExportConfig,
        argv,
        command="python jobs/export.py",
        about="Write a checkpoint as a .pt file that the repository of its method reads: SiT, "
        "REPA, HASTE, REG or iREPA.",
    )
    if config.out is None:
        raise UserError("--out is missing: the .pt file to write")
    if "://" in config.out:
        raise UserError(f"--out '{config.out}': name a local file, not a URL")
    checkpoint = find_checkpoint(config.checkpoint)
    if is_weights_file(Path(checkpoint)):
        raise UserError(
            f"--checkpoint '{config.checkpoint}' is already a .pt file: name a run or one of its "
            "checkpoints"
        )
    from pipeline.checkpoints.export import export_checkpoint  # torch takes seconds to import
    from pipeline.checkpoints.state import read_state
    from pipeline.cli.progress import saying

    out = Path(config.out).expanduser()
    with local_copy(checkpoint, weights=None) as folder:
        with saying(f"writing weights, averages and AdamW's state to '{out}'"):
            export_checkpoint(folder, out)
        reads_captions = read_state(folder).config.student.family == "MMDiT"
    print(out)
    sys.stdout.flush()
    condition = ("--caption", "a cat on a chair") if reads_captions else ()
    files = ("--checkpoint", str(out), *condition, "--png", "samples.png")
    log_next("pictures from the file", "jobs/sample.py", *files)
    return 0


if __name__ == "__main__":
    run_command(main)
