"""Codec steps: fixed ones beside those that a calibration chooses, measured on other images."""

from __future__ import annotations

import sys
import tempfile
import time
from typing import Any

import torch
from torch import Tensor

from pipeline.extract.calibration import Subject, calibrate, first_block
from pipeline.targets.cuts import cut_columns, with_steps
from pipeline.teachers import Teacher
from schemas.codecs import PROMISES, CalibratedSet
from tests.bench.frontier import Bench, make_teacher
from tests.bench.images import load_crops
from tests.bench.options import CalibrationOptions as Options
from tests.bench.outlier_weights import describe
from tests.bench.report import Heading, Report, Row, Table

LATENT = (4, 32, 32)
"""Latents of the random student; 16 x 16 tokens, as of the teacher."""
HEADINGS = (
    Heading("form", "form"),
    Heading("codecs", "codecs"),
    Heading("bytes", "bytes", ",d"),
    Heading("kl", "KL mean", ".2e"),
    Heading("feature_cosine", "feature cos", ".6f"),
    Heading("gradient_cosine", "gradient cos", ".6f"),
    Heading("kept", "promise"),
    Heading("seconds", "seconds", ".0f"),
)


def run(options: Options) -> Report:
    torch.set_num_threads(options.threads)
    crops, images_info = load_crops(
        options.images, options.count + options.calibrated, options.resolution
    )
    # every image at a fixed stride is another one: neighbours in the folder are of one class
    others = torch.linspace(0, len(crops) - 1, options.count).round().long()
    measured = torch.ones(len(crops), dtype=torch.bool)
    measured[others] = False
    about: dict[str, Any] = {"images": images_info, "calibrated": options.calibrated}
    tables = []
    for weights in options.weights:
        teacher = make_teacher(options, weights, crops[measured])
        about[f"weights {weights}"] = describe(teacher, crops[others][:4], options.layers[0])
        with tempfile.TemporaryDirectory(prefix="haste-bench-") as folder:
            bench = Bench(options, teacher, crops[others], folder)
            for cut in options.cuts:
                own = bench.teachers[cut]  # with the layers of the cut
                tokens = _tokens(own, crops[measured])
                table = Table(f"{cut}, {weights} weights", HEADINGS)
                for codec in options.codecs:
                    fixed = cut_columns(cut, own.info(), options.resolution, codec)
                    began = time.perf_counter()
                    subject = Subject(
                        cut=cut,
                        teacher=own,
                        columns=fixed,
                        keys=tuple(str(n) for n in range(len(tokens))),
                        tokens=tokens,
                        exact_tokens=None,
                        precision="float32",
                        device=torch.device("cpu"),
                    )
                    found = calibrate(
                        subject,
                        codec,
                        PROMISES[codec],
                        LATENT,
                        fixed=frozenset(),
                        images=len(tokens),
                        seed=0,
                    )
                    seconds = time.perf_counter() - began
                    chosen = with_steps(fixed, found.curves)
                    for form, columns in (("fixed", fixed), ("calibrated", chosen)):
                        row = bench.measure_columns(cut, f"{codec}, {form}", columns)
                        row["codecs"] = ", ".join(
                            f"{c.codec}{list(c.levels) or ''}"
                            for c in columns.values()
                            if c.codec != "float16"
                        )
                        row["kept"] = _kept(row, codec)
                        row["seconds"] = seconds if form == "calibrated" else None
                        table.rows.append(row)
                        print(weights, cut, row, file=sys.stderr, flush=True)
                tables.append(table)
    return Report(about, tables)


@torch.no_grad()
def _tokens(teacher: Teacher, crops: Tensor) -> Tensor:
    """Tokens that enter the first stored layer, in batches of one, as the store's."""
    first = first_block(teacher)
    parts = [teacher.embed(teacher.preprocess(one)) for one in crops.split(1)]
    return torch.cat([teacher.run_blocks(one, 0, first)[0] for one in parts])


def _kept(row: Row, codec: CalibratedSet) -> str:
    promise = PROMISES[codec]
    kept = row["kl"] <= promise.kl
    for name in ("feature_cosine", "gradient_cosine"):
        kept = kept and row[name] >= getattr(promise, name)
    return "kept" if kept else "not kept"
