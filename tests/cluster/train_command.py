"""`python -m tests.cluster.train_command ...`: jobs/train_haste.py, which looks for new nodes every
few seconds instead of every minute, so that a drill takes less time."""

import sys
from functools import partial

from jobs.train_haste import main
from pipeline.cli.command import run_command
from pipeline.train import ray_trainer

LOOK_SECONDS = 8.0

if __name__ == "__main__":
    sys.argv[0] = "jobs/train_haste.py"
    ray_trainer.ScalingConfig = partial(  # type: ignore[misc,assignment]
        ray_trainer.ScalingConfig, elastic_resize_monitor_interval_s=LOOK_SECONDS
    )
    run_command(main)
