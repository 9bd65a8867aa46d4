"""Refers callers of the former ``python -m pipeline.store convert`` to ``pipeline.convert``."""

from __future__ import annotations

from pipeline.cli.command import run_command
from schemas.errors import UserError


def main(argv: list[str]) -> int:
    raise UserError(
        "python -m pipeline.store convert is now python -m pipeline.convert SOURCE TARGET"
    )


if __name__ == "__main__":
    run_command(main)
