"""Descriptions of samples: the JSON that ``jobs/sample.py`` writes with its images."""

from __future__ import annotations

import json
import logging
from typing import Any

import fsspec

from pipeline.storage.files import read_at_most
from pipeline.storage.npz import MAX_ABOUT
from schemas.sample import ABOUT_FILE, SampleAbout

logger = logging.getLogger(__name__)


def parse_sample_info(values: Any, where: str) -> SampleAbout | None:
    """The description of samples at ``where`` from its JSON values. None, with a warning, where
    they are not those of ``jobs/sample.py`` or of another version; None for ``{}``."""
    info = SampleAbout.parse_or_none(values)
    if info is None and values != {}:
        logger.warning(
            "%s: its description of the images is ignored, because it is not one that "
            "jobs/sample.py writes",
            where,
        )
    return info


def read_folder_info(
    filesystem: fsspec.AbstractFileSystem, root: str, where: str
) -> SampleAbout | None:
    """The description in ``about.json`` of a folder of samples; None as above. Raises
    ``StorageError``."""
    data = read_at_most(filesystem, f"{root}/{ABOUT_FILE}", MAX_ABOUT + 1)
    try:
        values = json.loads(data) if len(data) <= MAX_ABOUT else None
    except (ValueError, RecursionError):
        values = None
    return parse_sample_info(values, where)
