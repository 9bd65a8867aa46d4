"""Names of the tars of a source: a folder, one tar, or a pattern with braces (as stock webdataset
expands them) or wildcards."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice

import braceexpand

from pipeline.datasets.listing_check import short_name
from pipeline.storage.files import exists, open_url, redact, retrying
from schemas.errors import UserError

MAX_TARS = 1 << 20
"""Names that a pattern may expand to."""
COMPRESSED = re.compile(r"\.(tgz|tbz2?|txz|tar\.(gz|bz2|xz|zstd?|lz4|lzma|z|br))$", re.IGNORECASE)
WILDCARD = re.compile(r"[*?\[]")

logger = logging.getLogger(__name__)


def choose_tars(source: str, paths: Sequence[str]) -> list[str]:
    """The tars among the ``paths`` of a source, sorted; ``""`` is a source that is one tar. Raises
    ``UserError`` if there are none, or a compressed one."""
    compressed = [path for path in paths if COMPRESSED.search(path)]
    if compressed:
        raise UserError(
            f"--source '{redact(source)}': {short_name(compressed[0])} is compressed; only plain "
            "tars are read: decompress it"
        )
    tars = [path for path in paths if path.lower().endswith(".tar") or path == ""]
    others = sorted(set(paths) - set(tars))
    if not tars:
        missing = "has" if others else "does not exist, or has"
        what = f", only {len(others)} others" if others else ""
        raise UserError(f"--source '{redact(source)}' {missing} no .tar files{what}")
    if others:
        logger.info(
            "--source '%s': %d files that are not .tar are not read, such as %s",
            redact(source),
            len(others),
            short_name(others[0]),
        )
    return sorted(tars)


def tar_root(source: str) -> str:
    """The folder or tar below which the paths of the tars lie. Raises ``UserError``."""
    return split_pattern(source)[0]


def split_pattern(source: str) -> tuple[str, str]:
    """The folder before the first part with a brace or a wildcard, and the rest; the whole source
    and ``""`` if it has none, or if it exists under this very name. Raises ``UserError``."""
    if ".tar::" in source.lower():
        raise UserError(
            f"--source '{redact(source)}': several tars are named by their folder, by braces "
            "({000..009}.tar) or by wildcards (*.tar), not by '::'"
        )
    scheme = source.partition("://")[0] if "://" in source else ""
    special = r"[*\[{]" if scheme.startswith("http") else r"[*?\[{]"  # queries of URLs
    found = re.search(special, source)
    if found is None or exists(*open_url(source, what="--source")):
        return source, ""
    cut = source.rfind("/", 0, found.start())
    if cut <= len(scheme) + 2 and scheme:
        raise UserError(f"--source '{redact(source)}': a pattern must not span buckets or hosts")
    return source[: max(cut, 0)] or ("/" if cut == 0 else "."), source[cut + 1 :]


def expand_pattern(source: str, root: str, pattern: str) -> Iterator[str]:
    """Paths below ``root`` that the pattern names. Raises ``UserError``."""
    try:
        names = list(islice(braceexpand.braceexpand(pattern), MAX_TARS + 1))
    except ValueError as error:
        raise UserError(f"--source '{redact(source)}': {error}") from None
    if len(names) > MAX_TARS:
        raise UserError(f"--source '{redact(source)}' names more than {MAX_TARS} tars")
    filesystem, folder = open_url(root, what="--source")
    seen: set[str] = set()
    for name in names:
        found = [name]
        if WILDCARD.search(name):
            place = f"{folder.rstrip('/')}/{name}"
            matches = retrying(partial(filesystem.glob, place), filesystem, folder, doing="list")
            relative = (str(match)[len(folder) :].lstrip("/") for match in matches)
            found = [path for path in relative if not re.search(r"(^|/)\.", path)]  # hidden
        for path in found:
            if path in seen:
                raise UserError(f"--source '{redact(source)}' names {short_name(path)} twice")
            seen.add(path)
            yield path
