"""`--fidelity`: errors of a store's targets against the teacher in float32, and their effect on
losses and gradients of a random student."""

from __future__ import annotations

import math
import time
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.alignment.aligned_student import AlignedStudent
from pipeline.alignment.losses import Targets
from pipeline.cli.progress import progress_bar
from pipeline.diffusion.normalisation import normalisation_of, normalise
from pipeline.inspect.source_images import SourceImages
from pipeline.inspect.summary import StoreSummary
from pipeline.precision import choose_device
from pipeline.runs.compatibility import check_store, with_classes
from pipeline.store import Store, StreamReader
from pipeline.store.layout import MANIFEST
from pipeline.targets.sources import (
    ReplayedTargets,
    Wanted,
    aligned_heads,
    open_targets,
    wanted_targets,
)
from pipeline.teachers import Teacher
from pipeline.teachers.manifest_check import create_meta_teacher, teacher_config
from pipeline.text import describe_bytes
from schemas.alignment import AlignmentConfig, StreamAlignment, place
from schemas.calibration import Calibration, TargetErrors
from schemas.cuts import cut_shapes
from schemas.errors import UserError
from schemas.fields import element_count
from schemas.networks import TeacherInfo
from schemas.run import RunConfig
from schemas.store import Manifest
from schemas.streams import Column, TeacherStream
from schemas.student import StudentConfig

CHUNK = 4  # images per forward pass: maps of 5 layers in float64 take 0.3 GB
HEAD_WIDTH = 16  # of the random student


@dataclass
class Fidelity:
    """Measurements over some images; KL(teacher || stored) of attention rows in nats."""

    cut: str
    layers: tuple[int, ...]
    images: int = 0
    cosine_min: float = 1.0
    cosine_sum: float = 0.0
    tokens: int = 0
    """Compared tokens; 0 where the losses take no features."""
    squares: Tensor = field(default_factory=lambda: torch.zeros(2, dtype=torch.float64))
    """(2,), summed over features: squares of the error and of the teacher's."""
    kl_sum: Tensor = field(default_factory=lambda: torch.zeros(0))
    """(layers,), summed over rows."""
    kl_max: Tensor = field(default_factory=lambda: torch.zeros(0))
    kl_rows: int = 0
    losses: Tensor = field(default_factory=lambda: torch.zeros(2, 2))
    """(2, 2), summed: targets of the teacher and of the store x feature and attention loss."""
    products: Tensor = field(default_factory=lambda: torch.zeros(3))
    """(3,), summed dot products of the student's gradients: teacher's with itself, store's with
    itself, teacher's with store's."""
    read_seconds: float = 0.0
    decode_seconds: float = 0.0
    calibration: Calibration | None = None
    """Calibration whose promise is checked; None for fixed steps and for the losses of a run."""
    others: bool = True
    """False where the store holds no images but those of the calibration."""

    @property
    def codec_errors(self) -> TargetErrors | None:
        """Errors of the codec: those against float32, without those that the calibration measured
        of the extraction's arithmetic alone, because means of squares add. None without one."""
        if self.calibration is None:
            return None
        rows = len(self.layers) * self.kl_rows
        found = TargetErrors(
            kl=float(self.kl_sum.sum()) / rows if rows else None,
            feature_cosine=self.cosine_sum / max(1, self.tokens),
            gradient_cosine=self.gradient_cosine,
        )
        own = self.calibration.arithmetic
        if own is None:
            return found
        return TargetErrors(
            kl=None if found.kl is None else max(0.0, found.kl - (own.kl or 0.0)),
            feature_cosine=min(1.0, found.feature_cosine + 1 - own.feature_cosine),
            gradient_cosine=min(1.0, found.gradient_cosine + 1 - own.gradient_cosine),
        )

    @property
    def kept(self) -> bool | None:
        """True if the codec keeps its promise on these images; None without a calibration."""
        errors = self.codec_errors
        if errors is None or self.calibration is None:
            return None
        return errors.keep(self.calibration.promise)

    @property
    def loss_errors(self) -> tuple[float, float]:
        """Relative errors of the feature and the attention loss."""
        errors = (self.losses[1] - self.losses[0]).abs() / self.losses[0].abs().clamp_min(1e-12)
        return float(errors[0]), float(errors[1])

    @property
    def gradient_cosine(self) -> float:
        """Cosine of the student's gradients with the teacher's and with the store's targets."""
        own, stored, both = self.products.double().tolist()
        return float(min(1.0, both / max((own * stored) ** 0.5, 1e-300)))

    def as_json(self, summary: StoreSummary) -> dict[str, Any]:
        """The measurements under the keys of ``--json``."""
        feature, attention = self.loss_errors
        each = 1000 / self.images
        error, square = self.squares.tolist()
        values = {
            "bytes_per_image": summary.bytes_per_image,
            "fixed_bytes": summary.fixed_bytes,
            "feature_cosine_min": self.cosine_min,
            "feature_cosine_mean": self.cosine_sum / max(1, self.tokens),
            "feature_relative_error": (error / max(square, 1e-300)) ** 0.5,
            "attention_kl_mean": float(self.kl_sum.sum()) / max(1, len(self.layers) * self.kl_rows),
            "attention_kl_max": max(self.kl_max.tolist(), default=0.0),
            "loss_relative_error": max(feature, attention),
            "gradient_cosine": self.gradient_cosine,
            "feature_loss_relative_error": feature,
            "attention_loss_relative_error": attention,
            "layers": {
                str(layer): {"kl_mean": float(total) / self.kl_rows, "kl_max": float(worst)}
                for layer, total, worst in zip(self.layers, self.kl_sum, self.kl_max, strict=True)
            },
            "images": self.images,
            "read_milliseconds_per_image": self.read_seconds * each,
            "decode_milliseconds_per_image": self.decode_seconds * each,
        }
        if self.calibration is not None and self.codec_errors is not None:
            values["promise"] = {
                **self.calibration.promise.model_dump(),
                "kept": self.kept,
                "errors": self.codec_errors.model_dump(),
                "other_images": self.others,
            }
        absent = {"feature_"} if not self.tokens else set()
        absent |= {"attention_"} if not self.layers else set()
        return {k: None if k.startswith(tuple(absent)) else value for k, value in values.items()}


@torch.no_grad()
def measure_fidelity(
    store: Store,
    count: int,
    *,
    stream: str | None = None,
    source: str | None = None,
    weights: str | None = None,
    run: RunStream | None = None,
) -> Fidelity:
    """Compare the targets of ``count`` samples, evenly spaced in the store, with a new forward pass
    of the teacher: all that the store can give, or with ``run`` those of a run's losses. ``source``
    and ``weights`` replace those that the manifest names.

    Raises ``UserError`` if images or weights cannot be read or are not those of the store.
    """
    name, info = store.manifest.teacher_stream(stream if run is None else run.options.stream)
    store.require_complete("latents", name)
    device = torch.device(choose_device("auto"))
    teacher = open_teacher(store, name, weights).to(device)
    source_images = SourceImages(store, source)
    heads = info.teacher.heads
    if run is None:
        request = Wanted(features=True, layers=info.teacher.layers, heads=heads)
        latent_shape = store.manifest.autoencoder.latent_shape
        student = RandomStudent(student_like(latent_shape, info.teacher), info.teacher, heads)
    else:
        heads = aligned_heads(run.student, info.teacher)
        request = wanted_targets(run.options, heads)
        student = RandomStudent(run, info.teacher, heads)
    student = student.to(device)
    targets = open_targets(store, name, request, device)
    exact_source = ReplayedTargets(name, _crops_of(info, store.manifest), teacher, request)
    readers = {part: StreamReader(store, part) for part in (name, "latents")}
    layers = len(request.layers)
    found = Fidelity(
        info.cut, request.layers, kl_sum=torch.zeros(layers), kl_max=torch.zeros(layers)
    )
    found.calibration = info.calibration if run is None else None
    measured: Collection[str] = set(found.calibration.keys) if found.calibration else ()
    shards, rows, found.others = spread(store, count, measured)
    starts = range(0, len(shards), CHUNK)
    for start in progress_bar(starts, unit="batch", desc=f"fidelity of {name}"):
        where = shards[start : start + CHUNK], rows[start : start + CHUNK]
        crops = torch.from_numpy(source_images(where[0].tolist(), where[1].tolist()))
        exact = exact_source({"crop": crops.to(device)})
        began = time.perf_counter()
        columns = {n: torch.from_numpy(a) for n, a in readers[name].read(*where).items()}
        found.read_seconds += time.perf_counter() - began
        began = time.perf_counter()
        decoded = targets({n: tensor.to(device) for n, tensor in columns.items()})
        if device.type == "cuda":
            torch.cuda.synchronize()
        found.decode_seconds += time.perf_counter() - began
        latents = torch.from_numpy(readers["latents"].read(*where)["mean"]).float()
        latents = normalise(latents, normalisation_of(store.manifest.autoencoder))
        _compare(found, exact, decoded)
        student.compare(found, latents.to(device), exact, decoded)
        found.images += len(where[0])
    return found


def measure_config(
    store: Store,
    config: RunConfig,
    count: int,
    *,
    source: str | None = None,
    weights: str | None = None,
) -> dict[str, Fidelity]:
    """``measure_fidelity`` for the targets and losses of each teacher stream of a run, by the key
    of its options. Raises ``UserError`` also where the store does not fit the run."""
    check_store(with_classes(config, store.manifest), store.manifest)
    if not config.alignment.active:
        raise UserError(f"run '{config.name}' has no alignment: there are no targets to compare")
    student = config.student
    if student.family != "SiT":  # the losses of targets are those of a SiT of the same sizes
        depth, width, heads, patch = student.size
        student = StudentConfig(
            model=f"SiT-B/{patch}",
            latent_size=student.latent_size,
            latent_channels=student.latent_channels,
            num_classes=student.num_classes,
            depth=depth,
            width=width,
            heads=heads,
        )
    return {
        place(number): measure_fidelity(
            store, count, source=source, weights=weights, run=RunStream(student, options)
        )
        for number, options in enumerate(config.alignment.streams)
    }


class RunStream(NamedTuple):
    """A run's student, and its options of one teacher stream."""

    student: StudentConfig
    options: StreamAlignment


def _crops_of(stream: TeacherStream, manifest: Manifest) -> TeacherStream:
    """A stream of the crops that another was computed from, whose teacher runs in float32."""
    shapes = cut_shapes("image", stream.teacher, manifest.resolution)
    return stream.model_copy(
        update={
            "cut": "image",
            "columns": {"crop": Column(shape=shapes["crop"], codec="uint8")},
            "compute": stream.compute.model_copy(update={"precision": "float32"}),
        }
    )


def describe_fidelity(found: Fidelity, summary: StoreSummary) -> str:
    """The result as lines of text."""
    values = found.as_json(summary)
    features = (
        [
            f"  features       cosine mean {values['feature_cosine_mean']:.6f}, "
            f"min {values['feature_cosine_min']:.6f} over tokens; relative error "
            f"{values['feature_relative_error']:.2e}"
        ]
        if found.tokens
        else []
    )
    attention = (
        [
            f"  all layers     attention KL mean {values['attention_kl_mean']:.2e} nats per row, "
            f"largest row {values['attention_kl_max']:.2e} nats"
        ]
        if found.layers
        else []
    )
    losses = ", ".join(
        f"{kind} loss {'off by ' if not n else 'by '}{values[f'{kind}_loss_relative_error']:.2e}"
        for n, kind in enumerate(
            kind for kind, there in (("feature", features), ("attention", attention)) if there
        )
    )
    rows = [
        f"  layer {layer:<3}      attention KL mean {one['kl_mean']:.2e} nats per row, "
        f"largest row {one['kl_max']:.2e} nats"
        for layer, one in values["layers"].items()
    ]
    return "\n".join(
        [
            f"fidelity of cut '{found.cut}' over {found.images} images, against the teacher in "
            "float32:",
            *features,
            *rows,
            *attention,
            f"  random student {losses}, gradient cosine {values['gradient_cosine']:.6f}",
            *_promise(found),
            f"  per image      {describe_bytes(summary.bytes_per_image)}; "
            f"{describe_bytes(summary.fixed_bytes)} outside the shards; mean time "
            f"{values['read_milliseconds_per_image']:.2f} ms to read the stream, "
            f"{values['decode_milliseconds_per_image']:.2f} ms to compute its targets "
            f"({CHUNK} images at a time, first ones included)",
        ]
    )


def _promise(found: Fidelity) -> list[str]:
    calibration, errors = found.calibration, found.codec_errors
    if calibration is None or errors is None:
        return []
    promise = calibration.promise
    parts = [] if errors.kl is None else [f"KL {errors.kl:.2e} of at most {promise.kl:g}"]
    parts += [
        f"{name} cosine {getattr(errors, f'{name}_cosine'):.6f} of at least "
        f"{getattr(promise, f'{name}_cosine'):g}"
        for name in ("feature", "gradient")
    ]
    images = f"{found.images} other images" if found.others else "the calibration's own images"
    arithmetic = "" if calibration.arithmetic is None else ", arithmetic subtracted"
    verdict = "kept" if found.kept else "NOT KEPT"
    return [f"  promise        {verdict} on {images}{arithmetic}: {', '.join(parts)}"]


def open_teacher(store: Store, stream: str, weights: str | None) -> Teacher:
    """The complete teacher of a stream, not only its tail. Raises ``UserError`` if ``weights`` are
    not those of the store."""
    info, resolution = store.manifest.teacher_streams[stream].teacher, store.manifest.resolution
    create_meta_teacher(info, resolution, f"{store.shown_url}/{MANIFEST}: streams.{stream}.teacher")
    config = teacher_config(info)
    if weights is not None:
        config = config.model_copy(update={"weights": weights})
    teacher = Teacher(config, resolution=resolution, layers=info.layers)
    if teacher.weights_sha256 != info.weights_sha256:
        raise UserError(
            f"--teacher.weights '{config.weights}' are not those of the store: SHA-256 "
            f"{teacher.weights_sha256[:12]}..., not {info.weights_sha256[:12]}..."
        )
    return teacher


def spread(
    store: Store, count: int, measured: Collection[str] = ()
) -> tuple[np.ndarray, np.ndarray, bool]:
    """Shards and rows of samples, evenly spaced in the store, without those that a calibration
    ``measured``; False in the end if there are no others, and these are taken."""
    sizes = np.asarray(store.index().samples_per_shard)
    total = int(sizes.sum())
    if not total:
        raise UserError(f"store '{store.shown_url}' holds no samples")
    ends = np.cumsum(sizes)

    def places(of: int) -> tuple[np.ndarray, np.ndarray]:
        chosen = np.unique(np.linspace(0, total - 1, min(of, total)).round().astype(np.int64))
        shards = np.searchsorted(ends, chosen, side="right")
        return shards, chosen - (ends - sizes)[shards]

    shards, rows = places(count + len(measured))
    pairs = zip(shards.tolist(), rows.tolist(), strict=True)
    others = np.asarray([not measured or store.record(s).keys[r] not in measured for s, r in pairs])
    if not others.any():
        return *places(count), False
    shards, rows = shards[others], rows[others]
    thinned = np.linspace(0, len(rows) - 1, min(count, len(rows))).round().astype(np.int64)
    return shards[thinned], rows[thinned], True


def _compare(found: Fidelity, exact: Targets, decoded: Targets) -> None:
    if exact.features is not None and decoded.features is not None:
        one, other = exact.features.double(), decoded.features.double()
        cosine = torch.cosine_similarity(one, other, dim=-1)
        found.cosine_min = min(found.cosine_min, float(cosine.min()))
        found.cosine_sum += float(cosine.sum())
        found.tokens += cosine.numel()
        found.squares += torch.stack([(other - one).square().sum(), one.square().sum()]).cpu()
    if exact.attention is None or decoded.attention is None:
        return
    kl = kl_of_rows(exact.attention, decoded.attention).transpose(0, 1).flatten(1).cpu().float()
    found.kl_sum += kl.sum(1)
    found.kl_max = torch.maximum(found.kl_max, kl.amax(1))
    found.kl_rows += kl.shape[1]


def kl_of_rows(exact: Tensor, other: Tensor) -> Tensor:
    """KL(exact || other) in nats over the last axis. Zeros of ``other``, which rounding may cause,
    count as the smallest normal number of float32."""
    p = exact.double()
    q = other.double().clamp_min(torch.finfo(torch.float32).tiny)
    return torch.special.xlogy(p, p / q).sum(-1)


def _require_size(student: StudentConfig, layers: int) -> None:
    """Raises ``UserError`` if the manifest, which is not trusted, requires too large a student."""
    _, width, heads, _ = student.size
    tokens = math.prod(student.grid)
    try:
        element_count((layers, heads, tokens, tokens))
        element_count((layers + 1, 18, width, width))  # of a SiT's block
    except ValueError as error:
        raise UserError(f"--fidelity: a student like this teacher is too large: {error}") from None


def student_like(latent_shape: tuple[int, int, int], teacher: TeacherInfo) -> RunStream:
    """A SiT with one block for each teacher layer, aligned in order."""
    layers = len(teacher.layers)
    channels, rows, _ = latent_shape
    patches = [patch for patch in (1, 2, 4, 8) if rows == patch * teacher.grid[0]]
    student = StudentConfig(
        model=f"SiT-S/{patches[0] if patches else 1 + (rows + 1) % 2}",
        latent_size=rows,
        latent_channels=channels,
        num_classes=1,
        depth=layers + 1,
        width=HEAD_WIDTH * teacher.heads,
        heads=teacher.heads,
    )
    options = StreamAlignment(
        attention_weight=float(layers > 0),
        feature_weight=1.0,
        feature_depth=max(1, layers),
        student_layers=tuple(range(layers)),
        teacher_layers=teacher.layers,
        projector_width=256,
    )
    return RunStream(student, options)


class RandomStudent(nn.Module):
    """A run's student with random weights and narrow heads, and without a class token."""

    def __init__(self, run: RunStream, teacher: TeacherInfo, heads: int) -> None:
        super().__init__()
        _, _, own_heads, _ = run.student.size
        config = run.student.model_copy(
            update={
                "num_classes": 1,
                "width": HEAD_WIDTH * own_heads,
                "heads": own_heads,
                "class_token": None,
            }
        )
        _require_size(config, len(run.options.student_layers))
        alignment = AlignmentConfig.model_validate(run.options.model_dump())
        self.weights = (alignment.feature_weight, alignment.attention_weight)
        generator = torch.Generator().manual_seed(0)
        self.aligned = AlignedStudent(
            config,
            alignment,
            teacher_width=teacher.width,
            heads=heads,
            teacher_grid=teacher.grid,
        )
        for (
            parameter
        ) in self.aligned.parameters():  # the default initialisation makes blocks identities
            scale = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.1
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
        self.generator = generator
        self.after_weights = generator.get_state()
        self.latent_shape = config.latent_shape
        self.has_mean = False

    def restart(self) -> None:
        """Make the following comparisons draw the same noise and times as the first ones."""
        self.generator.set_state(self.after_weights)

    def random_latents(self, count: int) -> Tensor:
        """Normal latents (count, C, h, w) for comparisons without a store's."""
        return torch.randn(count, *self.latent_shape, generator=self.generator)

    def compare(self, found: Fidelity, latents: Tensor, exact: Targets, decoded: Targets) -> None:
        """Add losses and gradient products with both targets, on noisy scaled latents
        (B, C, h, w)."""
        self._set_mean(exact)
        noise = torch.randn(latents.shape, generator=self.generator).to(latents.device)
        t = torch.rand(len(latents), generator=self.generator).to(latents.device)
        x = torch.lerp(latents, noise, t.view(-1, 1, 1, 1))
        labels = torch.zeros(len(latents), dtype=torch.long, device=latents.device)
        gradients = []
        for row, targets in enumerate((exact, decoded)):
            with torch.enable_grad():
                losses = self.aligned(x, t, labels, noise - latents, targets)[1:3]
                total = self.weights[0] * losses[0] + self.weights[1] * losses[1]
                parameters = list(self.aligned.parameters())
                parts = torch.autograd.grad(total, parameters, allow_unused=True)
            found.losses[row] += losses.detach().cpu()
            gradients.append(torch.cat([g.flatten() for g in parts if g is not None]).double())
        one, other = gradients
        found.products += torch.stack([one @ one, other @ other, one @ other]).cpu().float()

    def _set_mean(self, exact: Targets) -> None:
        """Make the projector predict the teacher's mean feature at first: the cosine of a random
        student is near 0, and a relative error of it would have no meaning."""
        projector = self.aligned.projector
        if self.has_mean or projector is None or exact.features is None:
            return
        last = list(projector.modules())[-1]
        assert isinstance(last, nn.Linear | nn.Conv2d)
        assert last.bias is not None
        mean = exact.features.mean((0, 1))
        last.bias.copy_(mean)
        last.weight.mul_(float(mean.norm()) / len(mean) ** 0.5)
        self.has_mean = True
