"""Write a checkpoint as a .pt file that the SiT, REPA and HASTE repositories read.

python jobs/export.py --checkpoint runs/demo --out demo.pt
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.train.export import export_checkpoint
from pipeline.train.local import newest_checkpoint
from schemas.errors import UserError, run_command
from schemas.export import ExportConfig
from schemas.options import parse_options


def main(argv: list[str]) -> int:
    config = parse_options(
        ExportConfig,
        argv,
        command="python jobs/export.py",
        about="Write a checkpoint as a .pt file that the SiT, REPA and HASTE repositories read.",
    )
    if config.checkpoint is None:
        raise UserError("--checkpoint is missing: the folder of a run or of one checkpoint")
    if config.out is None:
        raise UserError("--out is missing: the .pt file to write")
    folder = newest_checkpoint(Path(config.checkpoint).expanduser())
    if folder is None:
        raise UserError(f"--checkpoint '{config.checkpoint}' holds no checkpoint")
    out = Path(config.out).expanduser()
    export_checkpoint(folder, out)
    print(out)
    return 0


if __name__ == "__main__":
    run_command(main)
