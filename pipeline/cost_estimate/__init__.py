"""`--plan`: the cost of every cut and codec, estimated before anything runs."""

from __future__ import annotations

FLAG = "--plan"


def wants_plan(argv: list[str]) -> bool:
    """True if a command line has the flag ``--plan`` or one of its options ``--plan.*``."""
    return any(argument == FLAG or argument.startswith(f"{FLAG}.") for argument in argv)
