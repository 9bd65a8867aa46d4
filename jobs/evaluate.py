"""Compare generated images with real ones: FID, sFID, Inception score, precision, recall and the
Fréchet distance on DINOv2's features.

python jobs/evaluate.py --samples samples.npz --reference VIRTUAL_imagenet256_labeled.npz
python jobs/evaluate.py --reference STORE --save-reference reference.npz
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.cli.command import run_command
from pipeline.cli.next_step import log_next, without_options
from pipeline.cli.options import parse_options
from schemas.evaluate import EvaluateConfig, Evaluation

logger = logging.getLogger("jobs.evaluate")


def main(argv: list[str]) -> int:
    config = parse_options(
        EvaluateConfig,
        argv,
        command="python jobs/evaluate.py",
        about="Compare generated images with real ones: FID, sFID, Inception score, precision, "
        "recall, FD-DINOv2. The Inception score depends on the order of the samples, so it is "
        "computed after a shuffle by a fixed seed, as in torch-fidelity.",
    )
    from pipeline.evaluate.options import check_options

    check_options(config)
    logger.info("opening the images and the networks")
    from pipeline.evaluate.evaluator import evaluate  # torch takes seconds to import
    from pipeline.precision import choose_device
    from pipeline.storage.files import redact

    evaluation = evaluate(config, choose_device(config.device))
    if evaluation is not None:
        print(evaluation.model_dump_json() if config.as_json else _table(evaluation))
    elif config.as_json:
        print(json.dumps({"save_reference": redact(str(config.save_reference))}))
    if evaluation is None:
        kept = without_options(argv, {"reference", "save_reference", "json"})
        files = ("--samples", "samples.npz", "--reference", redact(str(config.save_reference)))
        log_next("with images of jobs/sample.py", "jobs/evaluate.py", *kept, *files)
    elif config.record is not None:
        run = redact(config.record)
        log_next("the run with its evaluations", "pipeline.report", run, "--html", "report.html")
    else:
        logger.info("--record RUN adds these numbers to the run that made the samples")
    return 0


def _table(evaluation: Evaluation) -> str:
    lines = []
    for name, value in evaluation.model_dump().items():
        text = "-" if value is None else f"{value:.4f}" if isinstance(value, float) else value
        lines.append(f"{name:<16} {text}")
    return "\n".join(lines)


if __name__ == "__main__":
    run_command(main)
