"""Hints before the work of an extraction: settings that are allowed and seldom wanted."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Iterator

from PIL import Image

from pipeline.datasets import Listing, open_reader
from pipeline.extract.tasks import Description
from schemas.extract import IMAGENET_MEAN, IMAGENET_STD, ExtractConfig
from schemas.networks import AutoencoderInfo, TeacherInfo

FEW_TOKENS = 8
"""Tokens per side below which attention has little to say; the paper has 16."""
SMALL_LATENT = 8
"""Rows of a latent below which a student with patches of 2 has few tokens."""
USUAL_TOKENS = 16
EXAMINED_IMAGES = 8

logger = logging.getLogger(__name__)


def log_hints(config: ExtractConfig, listing: Listing, description: Description) -> None:
    """Log what a user may not expect of the teacher's input, the images' sizes and the latents."""
    if description.teacher is not None:
        report_statistics(config, description.teacher)
        _report_tokens(description.teacher)
    if config.dataset == "coco256_features" and description.teacher is not None:
        logger.warning(
            "the teacher sees the pictures of --source: HASTE's script writes them from values of "
            "-1 to 1 where 0 to 1 is expected, so that all below middle grey is black; --dataset "
            "coco gives the teacher the true pictures"
        )
    without = description.teacher is not None and description.class_token is None
    if config.class_token == "class" and without:
        logger.info(
            "teacher '%s' has no class token: no class stream is written; --class-token mean "
            "stores the mean of its patch tokens",
            config.teacher.model,
        )
    if description.autoencoder is not None:
        _report_latents(config, description.autoencoder)
    if config.dataset != "demo":
        _report_small_images(config, listing)


def report_statistics(config: ExtractConfig, teacher: TeacherInfo) -> None:
    """Log mean and std of the input of a teacher from a file, because a file does not name its
    own; a warning where the model's name has others than ImageNet's, which most files have."""
    if config.teacher.weights in {"hub", "demo", "random"} or config.pretrain is not None:
        return
    mean, std = (", ".join(f"{n:g}" for n in numbers) for numbers in (teacher.mean, teacher.std))
    if teacher.statistics_of == "options":
        logger.info("the teacher's input has mean %s and std %s, of options", mean, std)
        return
    usual = (teacher.mean, teacher.std) == (IMAGENET_MEAN, IMAGENET_STD)
    logger.log(
        logging.INFO if usual else logging.WARNING,
        "the teacher's input has mean %s and std %s, of the name '%s'; if %s was trained with "
        "others, such as ImageNet's (0.485,0.456,0.406 and 0.229,0.224,0.225), give --teacher.mean "
        "and --teacher.std",
        mean,
        std,
        teacher.model,
        teacher.weights,
    )


def _report_tokens(teacher: TeacherInfo) -> None:
    if min(teacher.grid) < FEW_TOKENS:
        patch = teacher.image_size // teacher.grid[0]
        logger.warning(
            "the teacher sees %d px as %dx%d tokens, which is few; --teacher.image-size %d gives "
            "%dx%d",
            teacher.image_size,
            *teacher.grid,
            USUAL_TOKENS * patch,
            USUAL_TOKENS,
            USUAL_TOKENS,
        )


def _report_latents(config: ExtractConfig, autoencoder: AutoencoderInfo) -> None:
    _, rows, columns = autoencoder.latent_shape
    if rows < SMALL_LATENT:
        logger.warning(
            "latents have %dx%d numbers per channel, which is few; a larger --resolution than %d "
            "gives more",
            rows,
            columns,
            config.resolution,
        )


def _report_small_images(config: ExtractConfig, listing: Listing) -> None:
    sides = list(_short_sides(config, listing))
    small = [side for side in sides if side < config.resolution]
    if small:
        logger.warning(
            "%d of %d examined images are smaller than --resolution %d (the smallest has %d px) "
            "and will be enlarged",
            len(small),
            len(sides),
            config.resolution,
            min(small),
        )


def _short_sides(config: ExtractConfig, listing: Listing) -> Iterator[int]:
    """Pixels of the short side of the first images; those that cannot be read are left out, because
    the encoders report them."""
    read = open_reader(config)
    for item in listing.items[:EXAMINED_IMAGES]:
        try:
            data = read(item)
        except Exception:  # of the storage, which has been tried for minutes, or of the file
            logger.debug("cannot read %s", item.path, exc_info=True)
            return
        with contextlib.suppress(Exception), Image.open(io.BytesIO(data)) as image:
            yield min(image.size)
