"""The two configs of a proposal: each choice with its reason."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from pipeline.quickstart.candidates import Student, Teacher
from pipeline.quickstart.commented_yaml import CommentedOptions
from pipeline.quickstart.machine import Machine
from pipeline.quickstart.survey import Survey

RESOLUTIONS = (32, 64, 128, 256)
CPU_RESOLUTION = 64
"""Largest crop where there is no GPU."""
HUB_AUTOENCODER = "stabilityai/sd-vae-ft-mse"
SHARES = {"teacher": 0.25, "autoencoder": 0.2}
"""Shares of the time that is left after the extraction; the training has the rest."""
LATENT_CHANNELS = 4
TERMINATION = 0.4
PROCESS_BYTES = 1.0e9
"""Memory of one process with torch and Ray."""


class Choices:
    """Choices for the images, the machine and the hours, and their configs."""

    survey: Survey
    machine: Machine
    work: Path
    given: str
    """The option that gave the hours."""
    resolution: int
    """Pixels per side of the crop."""
    latent: int
    """Rows and columns of the latents."""
    grid: int
    """Rows and columns of the tokens of student and teacher."""
    hub_teacher: bool
    """True where the teacher is the hub's; else it is trained first."""
    teacher: Teacher
    teacher_reason: str
    teacher_layers: tuple[int, ...]
    hub_autoencoder: bool
    autoencoder_reason: str
    widths: Sequence[int]
    """Channels of the levels of an own autoencoder."""
    steps: Mapping[str, int]
    """Steps of the networks that are trained first."""
    pretrain_batch: int
    student: Student
    student_reason: str
    train_steps: int
    batch: int

    @property
    def workers(self) -> int:
        return self.machine.gpus or min(2, self.machine.cores, max(1, self.survey.images))

    def _termination(self) -> int:
        return max(1, round(TERMINATION * self.train_steps))

    def _extract(self) -> CommentedOptions:
        survey, layout = self.survey, self.survey.layout
        sides = f"{survey.sizes[0][0]}x{survey.sizes[0][1]}"
        if survey.mixed:
            sides = f"mixed, the median short side {survey.short_side} px"
        made = CommentedOptions(
            "Extraction, written by pipeline.quickstart: teacher and autoencoder see every image "
            f"once. {survey.files:,} files, {len(survey.bad):,} bad ones among the "
            f"{survey.examined:,} that were examined; {len(survey.with_images):,} classes; sizes "
            f"{sides}; {'grey' if survey.grey else 'colour'}. Run it: python -m pipeline.extract "
            "--config THIS_FILE; costs of this and other cuts: python -m pipeline.extract --plan "
            "--config THIS_FILE --plan.trainer train.yaml"
        )
        made.set("dataset", layout.dataset, layout.reasons["dataset"])
        made.set("source", layout.source, layout.reasons["source"])
        options = dict(layout.options)
        if survey.lost and not options.get("allow_empty_classes"):
            options["allow_empty_classes"] = True
        for key, value in options.items():
            lost = f"all images of {len(survey.lost)} classes are bad"
            made.set(key, value, layout.reasons.get(key, lost))
        made.set("store", str(self.work / "store"), "the store, in the work folder")
        why = "files that are not images are left out and listed in the manifest"
        if survey.bad:
            why += f": {len(survey.bad)} of {survey.examined:,} examined, '{survey.bad[0][0]}' "
            why += f"first ({survey.bad[0][1]})"
        made.set("on_bad_image", "skip", why)
        larger = self.resolution > survey.short_side
        made.set(
            "resolution",
            self.resolution,
            f"the smallest crop here, images of {survey.short_side} px are enlarged"
            if larger
            else f"the largest of {_listed(RESOLUTIONS)} that the images ({sides}) fill"
            + ("" if self.machine.gpus else f", at most {CPU_RESOLUTION} without a GPU"),
        )
        self._set_networks(made)
        layers = list(self.teacher_layers)
        made.set(
            "cut",
            "activations",
            f"fewest bytes: the tokens that enter block {layers[0]}; training runs the blocks "
            "behind it",
        )
        made.set("layers", layers, "the layers that the student's attention is aligned to")
        shard = self._shard_size()
        made.set("shard_size", shard, f"{-(-survey.files // shard)} shards for {survey.files:,}")
        made.set("batch_size", min(64, shard), "images per forward pass; at most a shard")
        if not self.machine.gpus:
            made.set("actors", self._actors(), f"{self.machine.cores} cores, 8 actors at most")
        return made

    def _set_networks(self, made: CommentedOptions) -> None:
        networks = self.work / "networks"
        made.set("teacher.model", self.teacher.model, self.teacher_reason)
        if self.hub_teacher:
            made.set("teacher.weights", "hub", "timm's own download")
            size = self.teacher.patch * self.grid
            tokens = f"{self.grid} x {self.grid} tokens, the student's grid"
            made.set("teacher.image_size", size, f"{tokens}, of {self.teacher.patch} px each")
        else:
            weights = str(networks / "teacher.safetensors")
            made.set("teacher.weights", weights, "written before the extraction: see pretrain")
            made.set("teacher.image_size", self.resolution, "the crop as it is")
            arguments = {
                "patch_size": self.resolution // self.grid,
                "embed_dim": self.teacher.width,
                "depth": self.teacher.depth,
                "num_heads": self.teacher.heads,
            }
            made.set(
                "teacher.model_args",
                arguments,
                f"a small one, with {self.grid} x {self.grid} tokens, the student's grid",
            )
        name = HUB_AUTOENCODER if self.hub_autoencoder else str(networks / "autoencoder")
        made.set("autoencoder", name, self.autoencoder_reason)
        if not self.steps:
            return
        for network, key in (("teacher", "teacher_steps"), ("autoencoder", "autoencoder_steps")):
            share = f"{100 * SHARES[network]:g}% of the time that the extraction leaves"
            made.set(
                f"pretrain.{key}",
                self.steps.get(network, 0),
                share if network in self.steps else "it comes from the hub",
            )
        factor = self.resolution // self.latent
        if not self.hub_autoencoder:
            made.set(
                "pretrain.widths",
                self.widths,
                f"{len(self.widths)} levels: latents have 1/{factor} of the image's sides",
            )
        made.set("pretrain.batch_size", self.pretrain_batch, "64 on CPUs, 256 on GPUs")
        count = min(20_000, max(1, int(5e8 / (3 * self.resolution**2))))
        made.set("pretrain.images", count, "at most: 500 MB of memory")
        flip = not self.survey.grey
        made.set(
            "pretrain.flip",
            flip,
            "colour images mean the same when mirrored"
            if flip
            else "grey images may be digits or letters, which mirrored mean something else",
        )

    def _train(self) -> CommentedOptions:
        student, steps = self.student, self.train_steps
        made = CommentedOptions(
            "Training with HASTE, written by pipeline.quickstart: aligned with the teacher first, "
            "then without it. Run it: python jobs/train_haste.py --config THIS_FILE"
        )
        made.set("name", "run", "the run's folder below 'output'")
        made.set("output", str(self.work), "the work folder")
        made.set("store", str(self.work / "store"), "what the extraction wrote")
        epochs = steps * self.batch / max(1, self.survey.images)
        made.set("steps", steps, f"the rest of {self.given}: about {epochs:.2g} epochs")
        kind = "a GPU's memory" if self.machine.gpus else "CPUs"
        made.set("global_batch", self.batch, f"for {kind}; at most the number of images")
        decay = round(min(0.9999, max(0.5, 1 - 5 / steps)), 5)
        made.set("ema_decay", decay, "the average reaches over a fifth of the steps")
        every = max(1, steps // 50)
        made.set("log_every", every, "about fifty rows of metrics")
        made.set("student.model", student.model, self.student_reason)
        if not self.machine.gpus:
            small = "smaller than published, for CPUs"
            made.set("student.depth", student.depth, small)
            made.set("student.width", student.width, small)
            made.set("student.heads", student.heads, small)
        made.set("student.latent_size", self.latent, f"that of the latents of {self.resolution} px")
        classes = len(self.survey.names)
        made.set("student.num_classes", classes, "the classes of the source")
        made.set("alignment.feature_depth", student.feature_depth, "a third to two thirds in")
        layers = list(student.layers)
        made.set("alignment.student_layers", layers, "early blocks, as in the paper")
        made.set(
            "alignment.teacher_layers", list(self.teacher_layers), "late layers of the teacher"
        )
        wide = 2048 if student.width >= 384 else 256
        made.set("alignment.projector_width", wide, "for the student's width")
        made.set(
            "alignment.termination",
            {"kind": "fixed", "step": self._termination()},
            f"{100 * TERMINATION:g}% of the steps: later alignment holds the student back",
        )
        made.set("optimizer.learning_rate", student.learning_rate, "narrow students take more")
        if self.survey.files < 8 * self._shard_size():
            made.set("data.window", 4, "few shards")
        made.set(
            "workers.count",
            self.workers,
            "one for each GPU" if self.machine.gpus else f"for {self.machine.cores} CPU cores",
        )
        if not self.machine.gpus:
            share = max(1, self.machine.cores // self.workers)
            made.set("workers.cpus_per_worker", share, "an equal share of the cores")
        made.set("checkpoint.every", max(1, steps // 4), "four checkpoints")
        made.set("checkpoint.keep", 2, "the latest two")
        return made

    def _actors(self) -> int:
        memory = int(self.machine.memory_bytes / (1.5 * PROCESS_BYTES))
        return max(1, min(self.machine.cores, 8, memory, self._shards()))

    def _shards(self) -> int:
        return -(-self.survey.files // self._shard_size())

    def _shard_size(self) -> int:
        devices = max(1, self.machine.gpus or min(self.machine.cores, 8))
        wanted = self.survey.files // (8 * devices)
        return max(16, min(512, 2 ** int(math.log2(max(1, wanted)))))


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(str(number) for number in numbers)
