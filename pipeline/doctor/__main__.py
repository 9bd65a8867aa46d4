"""`python -m pipeline.doctor --store URL [--output URL] [--workers N] [--config FILE] [--json]`."""

from __future__ import annotations

import json
import sys

from pipeline.cli.command import run_command
from pipeline.cli.next_step import log_next, without_options
from pipeline.cli.options import parse_options
from schemas.doctor import DoctorConfig
from schemas.extract import PRESETS
from schemas.run import RunConfig

ABOUT = """\
Examine the Ray cluster from each of its nodes, before a run is paid for: versions, clocks, store
and output, read rate, disks, shared memory, GPUs, the network between nodes, and whether the models
load. Takes the options of jobs/train_haste.py; the read rate is compared with what the run needs
(--plan) where --config or options of the run are given. Exit code 1 if a check fails."""
OF_THE_RUN = {"student", "alignment", "global_batch", "steps", "precision"}
"""Options of which any says that the run is known."""


def main(argv: list[str]) -> int:
    config = parse_options(
        DoctorConfig,
        list(_with_worker_count(argv)),
        command="python -m pipeline.doctor",
        about=ABOUT,
        presets=PRESETS,
        preset_key="extract.dataset",
    )
    # Imported here because ray and torch take seconds, which the help and a refusal need not.
    from pipeline.doctor.examination import examine
    from pipeline.doctor.findings import as_json, describe
    from pipeline.storage.files import redact
    from pipeline.store import Store

    run_known = bool(config.model_fields_set & OF_THE_RUN)
    findings = examine(config, run_known=run_known)
    print(json.dumps(as_json(findings)) if config.as_json else describe(findings))
    if any(finding.status == "fail" for finding in findings):
        return 1
    sys.stdout.flush()
    if Store.exists(str(config.store)) and not run_known:  # the default run may not fit
        store = redact(str(config.store))
        log_next("configs that it can train", "pipeline.inspect", store, "--check")
    elif Store.exists(str(config.store)):
        own = {"json", *DoctorConfig.model_fields} - set(RunConfig.model_fields)
        words = without_options(_with_worker_count(argv), own)
        log_next("the training", "jobs/train_haste.py", *words)
    elif _gives_extraction(argv) or not config.extract.model_fields_set:
        # a config of the training is refused by the extraction
        own = set(DoctorConfig.model_fields) - {"extract", "ray_address"} | {"config"}
        words = [word.replace("--extract.", "--", 1) for word in without_options(argv, own)]
        log_next("the store", "pipeline.extract", *words, "--store", redact(str(config.store)))
    return 0


def _gives_extraction(argv: list[str]) -> bool:
    """True if options of the extraction are on the command line, not only in a file."""
    return any(word.startswith("--extract.") for word in argv)


def _with_worker_count(argv: list[str]) -> list[str]:
    """``--workers N`` as short for ``--workers.count N``."""
    short, full = "--workers", "--workers.count"
    return [full + word[len(short) :] if word.partition("=")[0] == short else word for word in argv]


if __name__ == "__main__":
    run_command(main)
