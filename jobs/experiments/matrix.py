"""Compare recipes on one data set: every arm with every seed on one store, judged by a network
trained apart. The same command continues an interrupted experiment.

    python jobs/experiments/matrix.py --config jobs/experiments/digits.yaml --output runs/digits
    python jobs/experiments/matrix.py --config jobs/experiments/cifar10.yaml \
        --source cifar10_train.zip --output runs/cifar10
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

if not __package__:  # run as a file: Python then searches this folder, not the repository root
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    import jobs  # noqa: F401  (reports packages that are not installed)

from jobs.experiments.options import MatrixConfig, check_options
from pipeline.cli.command import run_command
from pipeline.cli.next_step import log_next
from pipeline.cli.options import parse_options

logger = logging.getLogger("jobs.experiments")


def main(argv: list[str]) -> int:
    config = parse_options(
        MatrixConfig,
        argv,
        command="python jobs/experiments/matrix.py",
        about="Compare recipes on one data set. Begin with --config jobs/experiments/digits.yaml.",
    )
    check_options(config)
    logger.info("experiment in '%s'", config.output)
    from jobs.experiments.experiment import run_matrix  # torch takes seconds to import

    table, failed = run_matrix(config)
    print(table)
    if not failed:
        log_next("their tables on a page", "jobs/experiments/page.py", "--help")
    return 1 if failed else 0


if __name__ == "__main__":
    run_command(main)
