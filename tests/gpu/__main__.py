"""`python -m tests.gpu checks` on a machine with a GPU; `python -m tests.gpu results JSON`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from pipeline.cli.command import run_command
from pipeline.cli.options import parse_options
from schemas.base import Strict
from schemas.errors import UserError
from tests.gpu.results import write_section

RESULTS = Path(__file__).parents[1] / "bench" / "RESULTS.md"
USAGE = "usage: python -m tests.gpu checks [--help] | results JSON [RESULTS.md]"


class CheckOptions(Strict):
    """Options of the checks."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to compare with the CPU; 'auto' is the GPU if there is one."""
    budget: Annotated[float, Field(gt=0)] = 270
    """Seconds after which no check is begun."""
    out: str = "checks.json"
    """File of the results, written after each check."""


def main(argv: list[str]) -> int:
    name, *rest = argv or [""]
    if name == "checks":
        options = parse_options(
            CheckOptions, rest, command="python -m tests.gpu checks", about="Check a GPU."
        )
        import torch  # takes seconds

        from pipeline.precision import choose_device
        from tests.gpu.checks import run_checks

        device = torch.device(choose_device(options.device))
        report = run_checks(device, options.budget, Path(options.out))
        return int(any(check["status"] == "FAILED" for check in report["checks"].values()))
    if name == "results" and len(rest) in (1, 2):
        try:
            report = json.loads(Path(rest[0]).read_text(encoding="utf-8"))
            write_section(Path(rest[1]) if len(rest) == 2 else RESULTS, report)
        except OSError as error:
            raise UserError(f"'{error.filename}': {error.strerror}") from None
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"'{rest[0]}': not a file of `python -m tests.gpu checks`") from None
        return 0
    print(USAGE, file=sys.stdout if argv and name in {"-h", "--help"} else sys.stderr)
    return 0 if argv and name in {"-h", "--help"} else 2


if __name__ == "__main__":
    run_command(main)
