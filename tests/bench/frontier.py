"""Cut x codec: bytes, time and target errors of each codec variant."""

from __future__ import annotations

import copy
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor

from pipeline.alignment.losses import Targets
from pipeline.store.arrays import stream_parts
from pipeline.targets.cuts import cut_columns, cut_values, encode_values
from pipeline.targets.sources import MapsTargets, QkTargets, ReplayedTargets, TargetSource, Wanted
from pipeline.targets.tail import first_tail_block, save_tail
from pipeline.teachers import Teacher
from schemas.errors import UserError
from schemas.extract import Cut
from schemas.streams import Column, ComputeInfo, TeacherStream
from tests.bench.codec_variants import CodecVariant, codec_variants
from tests.bench.errors import Judge
from tests.bench.images import load_crops
from tests.bench.options import FrontierOptions as Options
from tests.bench.outlier_weights import describe, plant_outliers
from tests.bench.report import Heading, Report, Row, Table
from tests.bench.tar_members import decode_all, latent_bytes, read_members, tar_bytes, write_members

CUTS: tuple[Cut, ...] = ("activations", "qk", "maps", "image")
OTHER_SHAPES = {
    "register": "vit_base_patch14_reg4_dinov2.lvd142m",
    "dinov3": "vit_base_patch16_dinov3.lvd1689m",
}
"""Models of weights whose registers are loud, in place of patches."""
PLANTED = {"planted", *OTHER_SHAPES}
REPEATS = 3  # of short timings, for each image; medians are reported

HEADINGS = (
    Heading("form", "form"),
    Heading("bytes", "bytes", ",d"),
    Heading("bytes_with_latents", "+ latents", ",d"),
    Heading("kl", "KL mean", ".1e"),
    Heading("kl_max", "max", ".0e"),
    Heading("feature_cosine", "feature cos", ".6f"),
    Heading("feature_cosine_min", "min", ".6f"),
    Heading("gradient_cosine", "gradient cos", ".6f"),
    Heading("gradient_cosine_near", "near", ".4f"),
    Heading("loss_error", "loss", ".0e"),
    Heading("decode_ms", "decode", ".1f"),
    Heading("replay_ms", "replay", ".0f"),
    Heading("encode_ms", "encode", ".1f"),
    Heading("meets", "target"),
)


def run(options: Options) -> Report:
    torch.set_num_threads(options.threads)
    crops, images_info = load_crops(options.images, options.count, options.resolution)
    about: dict[str, Any] = {"images": images_info, "teacher": options.teacher.model}
    tables = []
    for weights in options.weights:
        teacher = make_teacher(options, weights, crops)
        about[f"weights {weights}"] = describe(teacher, crops[:4], options.layers[0])
        with tempfile.TemporaryDirectory(prefix="haste-bench-") as folder:
            bench = Bench(options, teacher, crops, folder)
            for cut in options.cuts:
                table = Table(f"{cut}, {weights} weights", HEADINGS)
                for variant in codec_variants(cut, singles=options.singles):
                    if not re.search(options.match, variant.name):
                        continue
                    table.rows.append(bench.measure(cut, variant))
                    print(weights, cut, variant.name, file=sys.stderr, flush=True)
                tables.append(table)
    return Report(about, tables)


def make_teacher(options: Options, weights: str, crops: Tensor) -> Teacher:
    chosen = "random" if weights in PLANTED | {"plain"} else weights
    update = {"weights": chosen}
    if weights in OTHER_SHAPES:
        update["model"] = OTHER_SHAPES[weights]
    config = options.teacher.model_copy(update=update)
    teacher = Teacher(config, resolution=options.resolution, layers=options.layers)
    if weights in PLANTED:
        if not options.layers[0]:
            raise UserError(f"--weights {weights} changes the block before the first of --layers")
        plant_outliers(
            teacher,
            crops,
            block=options.layers[0] - 1,
            sharpness=options.sharpness,
            seed=config.seed,
            registers=weights in OTHER_SHAPES,
        )
    return teacher


class Stored(NamedTuple):
    """A cut's images as a store holds them."""

    members: list[dict[str, bytes]]
    """Tar members of each image, by stored array."""
    bytes: int
    """Mean bytes of an image: its members with their headers and padding."""
    encode_ms: float


class Bench:
    """One teacher and its images."""

    def __init__(self, options: Options, teacher: Teacher, crops: Tensor, folder: str) -> None:
        self.options = options
        self.crops = crops
        self.teachers: dict[Cut, Teacher] = {}
        self.values: dict[Cut, dict[str, Tensor]] = {}
        self.tails: dict[Cut, Teacher] = {}
        measured = copy.copy(teacher)  # shares its modules
        measured.layers = options.measured
        needed: set[Cut] = {"maps", *options.cuts}
        for cut in sorted(needed):
            self.teachers[cut] = measured if cut in {"qk", "maps"} else teacher
            with torch.no_grad():
                parts = [cut_values(cut, self.teachers[cut], one) for one in crops.split(1)]
            self.values[cut] = {name: torch.cat([p[name] for p in parts]) for name in parts[0]}
        for cut in needed & {"activations", "image"}:
            self.tails[cut] = _load_tail(cut, teacher, folder, options.resolution)
        self.wanted = Wanted(features=True, layers=options.measured, heads=teacher.heads)
        exact = self.values["maps"]
        self.judge = Judge(
            teacher, options.measured, Targets(exact["features"], exact["attention"])
        )
        if "maps" not in options.cuts:
            del self.values["maps"]

    def measure(self, cut: Cut, variant: CodecVariant) -> Row:
        columns = cut_columns(
            cut,
            self.teachers[cut].info(),
            self.options.resolution,
            variant.codec,
            variant.overrides,
            compress=variant.compress,
        )
        return self.measure_columns(cut, variant.name, columns)

    def measure_columns(self, cut: Cut, name: str, columns: dict[str, Column]) -> Row:
        stored = self._store(cut, columns)
        source = self._source(cut, columns)
        parts = stream_parts(columns)
        targets: list[Targets] = []
        decode, replay = [], []
        for members in stored.members:
            batch, read_ms = timed(lambda m=members: read_members(parts, m))
            replays = cut in self.tails
            one, source_ms = timed(lambda b=batch: source(b), 1 if replays else REPEATS)
            targets.append(one)
            codec_ms = source_ms
            if replays:
                _, codec_ms = timed(lambda b=batch: decode_all(columns, b))
                replay.append(source_ms - codec_ms)
            decode.append(read_ms + codec_ms)
        numbers = self.judge(_concatenated(targets))
        return {
            "cut": cut,
            "form": name,
            "bytes": stored.bytes,
            "bytes_with_latents": stored.bytes + latent_bytes(self.options.resolution),
            **numbers,
            "decode_ms": statistics.median(decode),
            "replay_ms": statistics.median(replay) if replay else None,
            "encode_ms": stored.encode_ms,
            "meets": verdict(stored.bytes, numbers),
        }

    def _store(self, cut: Cut, columns: Mapping[str, Column]) -> Stored:
        parts = stream_parts(columns)
        members: list[dict[str, bytes]] = []
        times = []
        for i in range(len(self.crops)):
            values = {name: tensor[i : i + 1] for name, tensor in self.values[cut].items()}
            one, ms = timed(lambda v=values: write_members(parts, encode_values(columns, v)))
            members.append(one)
            times.append(ms)
        total = sum(tar_bytes(data) for one in members for data in one.values())
        return Stored(members, round(total / len(members)), statistics.median(times))

    def _source(self, cut: Cut, columns: dict[str, Column]) -> TargetSource:
        stream = TeacherStream(
            kind="teacher",
            cut=cut,
            columns=columns,
            teacher=self.teachers[cut].info(),
            compute=ComputeInfo(
                device="cpu",
                precision="float32",
                batch_size=1,
                threads=self.options.threads,
                versions={},
            ),
        )
        if cut in self.tails:
            return ReplayedTargets(cut, stream, self.tails[cut], self.wanted)
        return (MapsTargets if cut == "maps" else QkTargets)(cut, stream, self.wanted)


def verdict(stored: int, numbers: Mapping[str, float]) -> str:
    """Goal that a variant meets: 'faithful' is at most 0.20 MB, mean KL at most 2e-4 and both
    cosines at least 0.9999; '(faithful)' has the same errors but more bytes; 'small' is mean KL at
    most 1e-3; "" is none."""
    cosines = min(numbers["feature_cosine"], numbers["gradient_cosine"])
    if numbers["kl"] <= 2e-4 and cosines >= 0.9999:
        return "faithful" if stored <= 200_000 else "(faithful)"
    return "small" if numbers["kl"] <= 1e-3 else ""


def timed(function: Callable[[], Any], repeats: int = REPEATS) -> tuple[Any, float]:
    """Result of ``function`` and its median milliseconds of CPU time, which excludes other
    processes."""
    times = []
    for _ in range(repeats):
        start = time.process_time()
        result = function()
        times.append((time.process_time() - start) * 1e3)
    return result, statistics.median(times)


def _load_tail(cut: Cut, teacher: Teacher, folder: str, resolution: int) -> Teacher:
    """The part of the teacher that training runs, saved and loaded again."""
    first = first_tail_block(cut, teacher.layers)
    assert first is not None
    file = save_tail(teacher, folder, cut, first)
    return Teacher(
        teacher.config.model_copy(update={"image_size": teacher.image_size}),
        resolution=resolution,
        layers=teacher.layers,
        first_block=first,
        tail=load_file(f"{folder}/{file.file}"),
    )


def _concatenated(targets: list[Targets]) -> Targets:
    features = [one.features for one in targets if one.features is not None]
    attention = [one.attention for one in targets if one.attention is not None]
    return Targets(torch.cat(features), torch.cat(attention))
