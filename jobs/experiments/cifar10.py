"""Compare HASTE, its parts and its controls on CIFAR-10: six arms, any seeds, one store.

    python jobs/experiments/cifar10.py --source cifar10_train.zip --work runs/cifar10
    python jobs/experiments/cifar10.py --source cifar10_train.zip --work runs/cifar10_cpu \
        --config jobs/experiments/cifar10_cpu.yaml
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # run as a file: Python then searches this folder, not the repository root
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    import jobs  # noqa: F401  (reports packages that are not installed)

from jobs.experiments.options import DEFAULTS, Cifar10Config, check_options
from pipeline.cli.command import run_command
from pipeline.cli.options import parse_options


def main(argv: list[str]) -> int:
    if "--config" not in argv and not any(part.startswith("--config=") for part in argv):
        argv = ["--config", str(DEFAULTS), *argv]
    config = parse_options(
        Cifar10Config,
        argv,
        command="python jobs/experiments/cifar10.py",
        about="Compare HASTE, its parts and its controls on CIFAR-10.",
    )
    check_options(config)
    from jobs.experiments.matrix import run_matrix  # torch takes seconds to import

    print(run_matrix(config))
    return 0


if __name__ == "__main__":
    run_command(main)
