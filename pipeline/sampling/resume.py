"""What an earlier command has left, and whether anybody has to draw for this one."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from pipeline.autoencoders import open_decoder
from pipeline.checkpoints.resolve import find_checkpoint, local_copy
from pipeline.checkpoints.student import load_trained_student
from pipeline.hashing import sha256_of_module
from pipeline.precision import choose_arithmetic
from pipeline.sampling.batches import ImageBatch, choose_classes
from pipeline.sampling.outputs import Output, are_same_images
from pipeline.storage.files import absolute_url, redact
from schemas.errors import UserError
from schemas.sample import SampleAbout, SampleConfig


def find_checkpoint_again(config: SampleConfig, outputs: Sequence[Output]) -> str:
    """What ``find_checkpoint`` finds; of a run the checkpoint that unfinished images are of, for
    the run may have trained on since. Raises ``UserError``, also where it has removed that one."""
    unfinished = ((output, output.found()) for output in outputs if not output.is_finished())
    output, begun = next(((o, about) for o, about in unfinished if about), (None, None))
    place = find_checkpoint(config.checkpoint, None if begun is None else begun.step)
    if output is None or begun is None or begun.step is None:
        return place
    run, _, name = redact(place).rpartition("/")
    asked = redact(absolute_url(str(config.checkpoint)).rstrip("/"))
    if asked != run:  # not a run, but one of its checkpoints
        return place
    if begun.checkpoint.rpartition("/")[::2] == (run, name):
        print(f"going on with '{begun.checkpoint}' of '{output.unfinished}'", file=sys.stderr)
    elif begun.checkpoint.rpartition("/")[0] == run:
        raise UserError(
            f"'{output.unfinished}' is of '{begun.checkpoint}', which the run has removed since "
            f"(checkpoint.keep): delete '{output.unfinished}' to begin again with '{name}'"
        )
    return place


def already_complete(
    config: SampleConfig, checkpoint: str, outputs: Sequence[Output], blocks: Sequence[ImageBatch]
) -> SampleAbout | None:
    """What the images are, where every one of them has been drawn as ``config`` asks, and
    ``outputs`` are then open; else None.

    This process reads the checkpoint to know that, and no worker is needed.
    """
    abouts = [about for output in outputs if (about := output.found()) is not None]
    if len(abouts) < len(outputs) or not _fits(config, checkpoint, abouts[0]):
        return None
    about = abouts[0]
    if not all(are_same_images(about, other) for other in abouts[1:]):
        return None
    for output in outputs:
        output.open(about)
        if output.missing(blocks):
            return None
    with local_copy(checkpoint, config.weights) as local:
        trained = load_trained_student(local, config.weights, config.model)
    student = trained.student
    same = (
        about.weights_sha256 == sha256_of_module(student)
        and about.model == student.config.model
        and about.path == trained.path
        and about.classes == choose_classes(config.classes, student.config.num_classes)
    )
    if not same:
        return None
    decoder = open_decoder(config.autoencoder, trained.encoder)
    ours = (decoder.name, decoder.weights_sha256)
    return about if ours == (about.autoencoder, about.autoencoder_sha256) else None


def _fits(config: SampleConfig, checkpoint: str, about: SampleAbout) -> bool:
    """As far as that can be told without the checkpoint's weights."""
    same = all(
        getattr(config, key) == getattr(about, key)
        for key in ("num", "labels", "batch_size", "weights", "sampler")
    )
    precision = config.precision
    if precision == "auto":
        precision = choose_arithmetic("auto", about.device)
    return (
        same
        and about.checkpoint == redact(checkpoint)
        and about.precision == precision
        and config.device in ("auto", about.device)
    )
