"""Choices for one's own images: two configs and three commands, each choice with its reason.

All follow from the source, the machine and the hours, without a clock, so that the same input gives
the same files. Times are FLOPs over ``Machine.flops`` and rates of one core, for an idle machine.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from pipeline.cli.next_step import command_line
from pipeline.cost_estimate.costs import (
    CALIBRATION_PASSES,
    class_stream_bytes,
    latent_bytes,
    stored_bytes,
)
from pipeline.cost_estimate.meta_models import Geometry
from pipeline.quickstart.candidates import (
    ALIGNED,
    CPU_STUDENTS,
    GPU_STUDENTS,
    HUB_BASE,
    HUB_SMALL,
    OWN_LARGE,
    OWN_SMALL,
    Student,
    Teacher,
    transformer_flops,
)
from pipeline.quickstart.commented_yaml import CommentedOptions
from pipeline.quickstart.configs import (
    CPU_RESOLUTION,
    HUB_AUTOENCODER,
    LATENT_CHANNELS,
    PROCESS_BYTES,
    RESOLUTIONS,
    SHARES,
    TERMINATION,
    Choices,
)
from pipeline.quickstart.machine import Machine, at_hand
from pipeline.quickstart.survey import Survey
from pipeline.text import counted, describe_bytes, describe_hours
from schemas.codecs import CodecOptions
from schemas.fields import format_layers

HUB_AUTOENCODER_FILE = "diffusion_pytorch_model.safetensors"
SMALLEST_OF_HUB = 128
"""Smallest crop for the hub's autoencoder, whose latents have an eighth of its sides."""
PATCH = 2
"""Rows and columns of latents in one token of the student."""
SHARE_OF_EXTRACTION = 0.3
"""Largest share of the time for encoding with a teacher of the hub."""
OVERHEAD = 90.0
"""Seconds in which the three commands start: Ray, torch, workers."""
PER_PIXEL = 1e-8
PER_IMAGE = 3e-3
"""Seconds of one core to decode a pixel, and to read, compress and write an image's targets."""
ENCODER_FLOPS = 94.0
"""FLOPs of the autoencoder's encoder per width^2 and pixel of a level; its decoder has twice as
many."""
SAMPLER_STEPS = 50
GUIDANCE = 2.0
MAX_ROWS = 10
FEW_IMAGES = 100
SHARED_BYTES = 2.0e8
"""Shared memory that Ray needs on one machine, bytes."""


CPU_STEPS, GPU_STEPS = 5_000, 20_000
"""Steps that the time must allow for a student larger than the smallest."""


class Command(NamedTuple):
    """One of the three commands and its estimates."""

    name: str
    line: str
    seconds: float
    bytes: float
    """Bytes that it writes."""
    memory: float


@dataclass(frozen=True)
class Proposal:
    """Configs and commands."""

    extract: CommentedOptions
    train: CommentedOptions
    commands: tuple[Command, ...]
    notes: tuple[str, ...]
    """Choices in one sentence each."""
    warnings: tuple[str, ...]


def propose(survey: Survey, machine: Machine, hours: float, work: Path) -> Proposal:
    """The proposal for images on a machine. ``work`` is an absolute path."""
    return _Chooser(survey, machine, hours, work).proposal()


class _Chooser(Choices):
    """Choices, in the order in which one follows from another."""

    def __init__(self, survey: Survey, machine: Machine, hours: float, work: Path) -> None:
        self.survey, self.machine, self.work = survey, machine, work
        self.seconds = 3600 * hours
        self.given = f"--hours {hours:g}"
        gpu = machine.gpus > 0
        largest = RESOLUTIONS[-1] if gpu else CPU_RESOLUTION
        side = survey.short_side
        fitting = [size for size in RESOLUTIONS if size <= min(largest, side * 1.15)]
        self.resolution = fitting[-1] if fitting else RESOLUTIONS[0]
        self.hub_autoencoder, self.autoencoder_reason = self._find_autoencoder()
        self.widths = self._widths()
        factor = 8 if self.hub_autoencoder else 2 ** (len(self.widths) - 1)
        self.latent = self.resolution // factor
        self.grid = self.latent // PATCH
        self.teacher, self.hub_teacher, self.teacher_reason = self._find_teacher()
        self.encoding = self._encoding_seconds(self.teacher)
        trained = [name for name, hub in self._own().items() if not hub]
        left = max(self.seconds - OVERHEAD - self.encoding, 0.1 * self.seconds)
        budgets = {name: SHARES[name] * left for name in trained}
        images = 64 if not gpu else 256
        self.pretrain_batch = max(2, min(images, survey.images))
        self.steps = {
            name: _rounded(min(budget / self._step_seconds(name), 12_000), 10)
            for name, budget in budgets.items()
        }
        self.pretraining = sum(steps * self._step_seconds(n) for n, steps in self.steps.items())
        self.batch = self._batch()
        budget = max(left - sum(budgets.values()), 0.0)
        self.student, self.student_reason = self._find_student(budget)
        self.train_steps = _rounded(
            min(budget / self._train_step_seconds(self.student), 400_000), 20
        )
        self.teacher_layers = ALIGNED[self.teacher.depth, len(self.student.layers)]

    def _own(self) -> dict[str, bool]:
        """Networks, and True where they are from the hub."""
        return {"teacher": self.hub_teacher, "autoencoder": self.hub_autoencoder}

    def _find_autoencoder(self) -> tuple[bool, str]:
        size = self.resolution
        if size < SMALLEST_OF_HUB:
            return False, (
                f"trained on these images first: {HUB_AUTOENCODER} would leave {size // 8} x "
                f"{size // 8} numbers of each channel of {size} px"
            )
        missing = at_hand(HUB_AUTOENCODER, HUB_AUTOENCODER_FILE)
        if missing is None:
            return True, "Stable Diffusion's, which the hub or its cache has"
        return False, f"trained on these images first: {HUB_AUTOENCODER} {missing}"

    def _widths(self) -> list[int]:
        """Channels of the levels of an own autoencoder: latents of 16 rows, or 32 for 256 px."""
        levels = {32: 2, 64: 3, 128: 4, 256: 4}[self.resolution]
        first = 64 if self.machine.gpus else 16
        return [min(first * 2**level, 4 * first) for level in range(levels)]

    def _find_teacher(self) -> tuple[Teacher, bool, str]:
        own = OWN_LARGE if self.machine.gpus else OWN_SMALL
        wanted = HUB_BASE if self.machine.gpus else HUB_SMALL
        seconds = self._encoding_seconds(wanted)
        limit = SHARE_OF_EXTRACTION * self.seconds
        if seconds > limit:
            return (
                own,
                False,
                (
                    f"a small one is trained on these images first: {wanted.model} would take "
                    f"{describe_hours(seconds / 3600, 2)} of {self.given} here"
                ),
            )
        missing = at_hand(f"timm/{wanted.model}", "model.safetensors")
        if missing is None:
            return wanted, True, "DINOv2, which the hub or its cache has"
        return own, False, f"a small one is trained on these images first: {wanted.model} {missing}"

    def _encoder_flops(self) -> float:
        """FLOPs per image of the autoencoder's encoder."""
        if self.hub_autoencoder:
            return 2.7e11 * (self.resolution / 256) ** 2
        levels = enumerate(self.widths)
        return sum(ENCODER_FLOPS * (w * self.resolution / 2**n) ** 2 for n, w in levels)

    def _encoding_seconds(self, teacher: Teacher) -> float:
        return self.survey.files * self._image_seconds(teacher) + self._calibration_seconds(teacher)

    def _image_seconds(self, teacher: Teacher) -> float:
        """Seconds of all devices in which one image is encoded."""
        pixels = sum(w * h for w, h in self.survey.sizes) / len(self.survey.sizes)
        networks = (teacher.flops(self.grid) + self._encoder_flops()) / self.machine.flops
        reading = (PER_IMAGE + PER_PIXEL * pixels) / self.machine.cores
        return max(networks, reading) if self.machine.gpus else networks + reading

    def _calibration_seconds(self, teacher: Teacher) -> float:
        """Seconds of one device in which the codec's steps are chosen."""
        later = (teacher.depth - min(ALIGNED[teacher.depth, 3])) / teacher.depth
        passes = 1 + 2 * CALIBRATION_PASSES * later
        devices = self.machine.gpus or self.machine.cores
        images = CodecOptions().images(self.survey.files)
        return images * passes * teacher.flops(self.grid) * devices / self.machine.flops

    def _step_seconds(self, name: str) -> float:
        """Seconds of one step of the training of an own network."""
        if name == "autoencoder":
            each = 9 * self._encoder_flops()  # encoder, decoder twice as large, and backward passes
        else:  # the student sees two large crops and small ones, the teacher the large ones
            small = 4 if self.teacher is OWN_LARGE else 2
            views = 3 * (2 + small / 4) + 2
            each = views * self.teacher.flops(self.grid)
        flops = self.machine.flops / max(1, self.machine.gpus)  # one device
        return self.pretrain_batch * each / flops

    def _batch(self) -> int:
        largest = (256 if self.machine.gpu_bytes > 2e10 else 64) if self.machine.gpus else 32
        devices = max(1, self.machine.gpus)
        fitting = 2 ** int(math.log2(max(self.survey.images, 1)))
        return max(devices, self.workers, min(largest, fitting))

    def _train_step_seconds(self, student: Student) -> float:
        tokens = self.grid**2
        tail = (self.teacher.depth - min(self._tail(student))) / self.teacher.depth
        each = 3.3 * transformer_flops(student.depth, student.width, tokens)
        each += TERMINATION * tail * self.teacher.flops(self.grid)
        return self.batch * each / self.machine.flops

    def _tail(self, student: Student) -> tuple[int, ...]:
        return ALIGNED[self.teacher.depth, len(student.layers)]

    def _find_student(self, budget: float) -> tuple[Student, str]:
        """The largest whose training has enough steps and images."""
        all_students = GPU_STUDENTS if self.machine.gpus else CPU_STUDENTS
        enough = GPU_STEPS if self.machine.gpus else CPU_STEPS
        chosen = all_students[0]
        for student in all_students[1:]:
            fits = (self.teacher.depth, len(student.layers)) in ALIGNED
            steps = budget / self._train_step_seconds(student) if fits else 0
            if steps >= enough and self.survey.images >= student.images:
                chosen = student
        reason = f"the largest of {len(all_students)} sizes that gets {enough:,} steps in the time"
        if chosen is all_students[0]:
            reason = f"the smallest of {len(all_students)} sizes: the time or the images are few"
        return chosen, reason

    def proposal(self) -> Proposal:
        work = self.work
        extract, train = self._extract(), self._train()
        commands = self._commands()
        notes = (
            f"{self.resolution} px crops, {self.latent} x {self.latent} x {LATENT_CHANNELS} "
            f"latents, {self.grid} x {self.grid} tokens",
            f"teacher: {self.teacher_reason}",
            f"autoencoder: {self.autoencoder_reason}",
            f"student: {self.student.model}, depth {self.student.depth}, width "
            f"{self.student.width}: {self.student_reason}",
            f"training: {self.train_steps:,} steps of {self.batch} images, aligned until step "
            f"{self._termination():,}",
        )
        warnings = []
        if self.survey.images < FEW_IMAGES:
            warnings.append(
                f"{counted(self.survey.images, 'image')}: so few are memorised, and the "
                "pictures will repeat them; some hundreds for each class are a beginning"
            )
        total = sum(command.seconds for command in commands)
        if total > 1.25 * self.seconds:
            warnings.append(
                f"{self.given} is short: about {describe_hours(total / 3600, 2)} are needed, "
                f"{describe_hours(self.encoding / 3600, 2)} of them to encode the images once"
            )
        written = sum(command.bytes for command in commands)
        if written > self.machine.free_bytes:
            warnings.append(
                f"{describe_bytes(written)} will be written, and {work} has "
                f"{describe_bytes(self.machine.free_bytes)} free: use another --work"
            )
        if self.machine.shared_bytes < SHARED_BYTES:
            warnings.append(
                f"/dev/shm has {describe_bytes(self.machine.shared_bytes)}, and Ray needs "
                f"{describe_bytes(SHARED_BYTES)}: start the container with --shm-size=2g"
            )
        memory = max(command.memory for command in commands)
        if memory > self.machine.memory_bytes:
            warnings.append(
                f"about {describe_bytes(memory)} of memory are needed, and this machine has "
                f"{describe_bytes(self.machine.memory_bytes)}"
            )
        return Proposal(extract, train, commands, notes, tuple(warnings))

    def _commands(self) -> tuple[Command, ...]:
        survey, machine, student = self.survey, self.machine, self.student
        config = str(self.work / "extract.yaml")
        extract = command_line("pipeline.extract", "--config", config)
        config = str(self.work / "train.yaml")
        train = command_line("jobs/train_haste.py", "--config", config)
        rows = survey.with_images[:MAX_ROWS]
        per_class = 8 if len(rows) > 1 else 16
        guidance = ["--sampler.guidance", f"{GUIDANCE:g}"] if len(rows) > 1 else []
        sample = command_line(
            "jobs/sample.py",
            *("--checkpoint", str(self.work / "run"), "--classes", format_layers(rows)),
            *("--per-class", str(per_class), "--sampler.steps", str(SAMPLER_STEPS), *guidance),
            *("--png", str(self.work / "samples.png")),
        )
        forward = transformer_flops(student.depth, student.width, self.grid**2)
        drawn = len(rows) * per_class * SAMPLER_STEPS * (2 if guidance else 1) * forward
        each = machine.flops / max(1, machine.gpus)
        weights = 4 * 18 * student.depth * student.width**2
        step = self._train_step_seconds(student)
        start = OVERHEAD / 3
        processes = self._actors() if not machine.gpus else machine.gpus
        return (
            Command(
                "extract",
                extract,
                start + self.pretraining + self.encoding,
                survey.images * self._bytes_per_image(),
                PROCESS_BYTES * (1 + processes),
            ),
            Command(
                "train",
                train,
                start + self.train_steps * step,
                2 * 4 * weights,
                (PROCESS_BYTES + 8 * weights) * self.workers + PROCESS_BYTES,
            ),
            Command("sample", sample, start / 2 + drawn / each, 2e6, PROCESS_BYTES + 2 * weights),
        )

    def _bytes_per_image(self) -> float:
        geometry = Geometry(
            prefix=1,
            grid=(self.grid, self.grid),
            width=self.teacher.width,
            heads=self.teacher.heads,
            head_width=self.teacher.width // self.teacher.heads,
            depth=self.teacher.depth,
            layers=self.teacher_layers,
            resolution=self.resolution,
            latent_shape=(LATENT_CHANNELS, self.latent, self.latent),
        )
        stored = stored_bytes("activations", "faithful", geometry)
        return stored + class_stream_bytes("faithful", geometry) + latent_bytes(geometry)


def _rounded(value: float, least: int) -> int:
    """Two digits of a number of steps."""
    digits = 10 ** max(0, int(math.log10(max(value, 1))) - 1)
    return max(least, int(value // digits * digits))
