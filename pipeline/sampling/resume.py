"""Images of an earlier command: their checkpoint, and whether all of them exist."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from pipeline.autoencoders import open_decoder
from pipeline.checkpoints.resolve import find_checkpoint, local_copy
from pipeline.checkpoints.student import LoadedStudent, load_trained_student
from pipeline.hashing import sha256_of_module
from pipeline.precision import choose_arithmetic
from pipeline.sampling.batches import ImageBatch, choose_classes
from pipeline.sampling.outputs import Output, are_same_images
from pipeline.sampling.prompts import Prompts, describe_prompts
from pipeline.storage.files import absolute_url, redact
from schemas.errors import UserError
from schemas.sample import SampleAbout, SampleConfig

logger = logging.getLogger(__name__)


def find_checkpoint_to_resume(config: SampleConfig, outputs: Sequence[Output]) -> str:
    """The checkpoint of ``config``; if unfinished images of a run exist, the checkpoint that they
    were started with, because the run may have continued since. Raises ``UserError``, also if the
    run has deleted that checkpoint."""
    infos = ((output, output.read_info()) for output in outputs if not output.is_finished())
    output, info = next(((output, info) for output, info in infos if info), (None, None))
    checkpoint = find_checkpoint(config.checkpoint, None if info is None else info.step)
    if output is None or info is None or info.step is None:
        return checkpoint
    run, _, name = redact(checkpoint).rpartition("/")
    requested = redact(absolute_url(str(config.checkpoint)).rstrip("/"))
    if requested != run:  # one checkpoint of a run, not the run
        return checkpoint
    old_run, _, old_name = info.checkpoint.rpartition("/")
    if (old_run, old_name) == (run, name):
        logger.info("resuming '%s' with '%s'", output.unfinished, info.checkpoint)
    elif old_run == run:
        raise UserError(
            f"'{output.unfinished}' has images of '{info.checkpoint}', which the run has deleted "
            f"since (checkpoint.keep): delete '{output.unfinished}' to start again with '{name}'"
        )
    return checkpoint


def info_of_complete_images(
    config: SampleConfig,
    checkpoint: str,
    outputs: Sequence[Output],
    batches: Sequence[ImageBatch],
    prompts: Prompts | None = None,
) -> SampleAbout | None:
    """The description of the images where all of them have been drawn as ``config`` requests;
    ``outputs`` are then open. Else None.

    The checkpoint is read in this process, so that complete images need no worker.
    """
    infos = [info for output in outputs if (info := output.read_info()) is not None]
    if len(infos) < len(outputs) or not _has_options(infos[0], config, checkpoint):
        return None
    info = infos[0]
    if not all(are_same_images(info, other) for other in infos[1:]):
        return None
    for output in outputs:
        output.open(info)
        if output.missing(batches):
            return None
    return info if _has_weights(info, config, checkpoint, prompts) else None


def _has_options(info: SampleAbout, config: SampleConfig, checkpoint: str) -> bool:
    """True where the options and the checkpoint's name are those of the images."""
    same = all(
        getattr(config, key) == getattr(info, key)
        for key in ("num", "labels", "batch_size", "weights", "sampler", "compile")
    )
    precision = config.precision
    if precision == "auto":
        precision = choose_arithmetic("auto", info.device)
    return (
        same
        and info.checkpoint == redact(checkpoint)
        and info.precision == precision
        and config.device in ("auto", info.device)
    )


def _has_weights(
    info: SampleAbout, config: SampleConfig, checkpoint: str, prompts: Prompts | None
) -> bool:
    """True where student, captions and decoder are those of the images."""
    with local_copy(checkpoint, config.weights) as folder:
        trained = load_trained_student(folder, config.weights, config.model, config.file_options)
    student = trained.student
    same_student = (
        info.weights_sha256 == sha256_of_module(student)
        and info.model == student.config.model
        and info.convention == student.convention
        and _has_labels(info, config, prompts, trained)
    )
    if not same_student:
        return False
    decoder = open_decoder(config.autoencoder, trained.encoder)
    return (decoder.name, decoder.weights_sha256) == (info.autoencoder, info.autoencoder_sha256)


def _has_labels(
    info: SampleAbout, config: SampleConfig, prompts: Prompts | None, trained: LoadedStudent
) -> bool:
    """True where classes or captions are those of the images."""
    if prompts is None or trained.text_encoder is None or info.text is None:
        same_kind = prompts is None and trained.text_encoder is None and info.text is None
        return same_kind and info.classes == choose_classes(config.classes, trained.classes)
    wanted = describe_prompts(prompts, trained.text_encoder, config)
    places = {"captions": info.text.captions, "truncated": info.text.truncated}
    return info.text == wanted.model_copy(update=places)
