"""`--plan`: what every cut would cost, before anything runs."""

from __future__ import annotations

FLAG = "--plan"


def wants_plan(argv: list[str]) -> bool:
    """Whether a command line asks for a plan, by the flag or by one of a plan's options."""
    return any(argument == FLAG or argument.startswith(f"{FLAG}.") for argument in argv)
