"""Images in WebDataset tars: NAME.jpg (or png, webp, ...) and NAME.cls for each sample.

Members are read as stock webdataset reads them: a name ends at its first dot, suffixes may have
capitals, and metadata (``__NAME__``), members without a suffix, folders and links are skipped. A
sample that loses its image or its class that way is refused, and so is a tar that is not complete,
because stock webdataset reads fewer samples then and reports nothing.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import tarfile
from collections import Counter
from dataclasses import dataclass
from typing import BinaryIO

from pipeline.datasets.folder import escape_dots, list_files
from pipeline.datasets.listing import ImageItem, Listing, numbered_listing
from pipeline.datasets.listing_check import short_name
from pipeline.datasets.tar_source import choose_tars, expand_pattern, split_pattern
from pipeline.storage.files import is_local, open_url, redact, retrying
from pipeline.storage.redaction import without_secrets
from schemas.errors import UserError, plain_text

IMAGE_SUFFIXES = frozenset({"jpg", "jpeg", "png", "webp", "ppm", "pgm", "pbm", "pnm", "bmp"})

MAX_DIGITS = 32  # bytes of a .cls member
MAX_NAMED = 4  # members, classes or files in one message

METADATA = re.compile(r"__[^/]*__($|/)")
"""Start of the names that stock webdataset skips: __shard__, __info__/x.json."""

SPARSE = ("GNU.sparse.", "SCHILY.realsize", "SUN.holesdata")
"""Starts of pax headers that tell of holes; tarfile knows only the first, and not each version."""

COMPRESSED = re.compile(rb"\x1f\x8b\x08|BZh[1-9]1AY&SY|\xfd7zXZ\0|\x28\xb5\x2f\xfd")
"""First bytes of a file of gzip, bzip2, xz or zstd."""

HTTP_TAR = re.compile(r"https?://[^?]*\.tar(\?.*)?", re.IGNORECASE)

LINKS = {tarfile.LNKTYPE: "a hard link", tarfile.SYMTYPE: "a symbolic link"}

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Member:
    label: int | None = None
    offset: int | None = None
    length: int = 0
    unused: tuple[str, ...] = ()
    """Other members of the sample, for messages."""

    def add_unused(self, name: str) -> None:
        if len(self.unused) < MAX_NAMED:
            self.unused += (name,)


def list_tars(source: str) -> Listing:
    """List all samples of all tars of ``source``: a folder, one tar, or a pattern of tars. Raises
    ``UserError``."""
    root, pattern = split_pattern(source)
    shown = redact(root)
    if pattern:
        paths = list(expand_pattern(source, root, pattern))
    else:
        paths = [""] if HTTP_TAR.fullmatch(root) else list_files(root)  # a page lists no such file
    samples = []
    for path in choose_tars(source, paths):
        found = _scan(root, path)
        if not found:
            logger.warning("%s has no samples", plain_text(f"{shown}/{path}".rstrip("/")))
        samples += [(path, key, member) for key, member in found.items()]
    repeated = {key for key, count in Counter(key for _, key, _ in samples).items() if count > 1}
    items = []
    for path, key, member in samples:
        if member.offset is None or member.label is None:
            raise UserError(f"{shown}/{path}".rstrip("/") + f": {_incomplete(key, member)}")
        name = f"{escape_dots(path)}/{key}" if key in repeated else key
        items.append(ImageItem(name, member.label, path, member.offset, member.length))
    if not items:
        raise UserError(f"--source '{redact(source)}' has no samples")
    return numbered_listing(items, redact(source))


def _incomplete(key: str, member: _Member) -> str:
    """The reason why a sample cannot be used, and what to do about it."""
    wanted = IMAGE_SUFFIXES if member.offset is None else {"cls"}
    lacks = f"image ({', '.join(sorted(wanted))})" if member.offset is None else ".cls"
    text = f"sample '{short_name(key)}' has no {lacks}"
    if not member.unused:
        return text
    text += f"; it has {', '.join(short_name(name) for name in member.unused)}"
    if any(name.endswith(" link)") for name in member.unused):
        return f"{text}: WebDataset skips links, make the tar with --dereference --hard-dereference"
    dotted = [name.rpartition("/")[2].lower().split(".") for name in member.unused]
    if any(len(parts) > 2 and parts[-1] in wanted for parts in dotted):
        return f"{text}: WebDataset ends a sample's name at the first dot, rename the files"
    return text


def _scan(source: str, path: str) -> dict[str, _Member]:
    """Samples of one tar by key. Headers and .cls members are read, images are not. Raises
    ``UserError``."""
    filesystem, root = open_url(source, what="--source")
    tar_path = f"{root}/{path}".rstrip("/")
    where = f"{redact(source)}/{path}".rstrip("/")

    if is_local(filesystem) and not os.path.isfile(tar_path):  # reading a pipe might block forever
        reason = "not a regular file" if os.path.exists(tar_path) else "there is no such file"
        raise UserError(f"{where}: cannot read this tar ({reason})")

    def scan() -> dict[str, _Member]:
        with filesystem.open(tar_path, "rb") as raw:
            if COMPRESSED.match(raw.read(10)):
                raise tarfile.ReadError(
                    "it is compressed; images are read by offset: decompress it"
                )
            raw.seek(0)
            with tarfile.open(fileobj=raw, mode="r:") as tar:
                members = _members(tar, where)
                _check_end(raw, tar.offset)
                return members

    try:
        return retrying(scan, filesystem, tar_path, doing="read")
    except (
        OSError,
        tarfile.TarError,
        ValueError,
        OverflowError,
    ) as error:  # the last two: numbers in headers
        raise UserError(
            f"{where}: cannot read this tar ({without_secrets(str(error), source)})"
        ) from None


def _check_end(raw: BinaryIO, offset: int) -> None:
    """Raises ``tarfile.ReadError`` unless a block of zeros follows the last member and nothing but
    zeros follows that, because tarfile takes the end of the file and a damaged header for the end
    of the tar, too."""
    raw.seek(offset)
    block = raw.read(tarfile.BLOCKSIZE)
    if len(block) < tarfile.BLOCKSIZE:
        raise tarfile.ReadError(
            f"it ends at byte {offset} without an end block, as if cut between members: get it "
            "again; if it is whole, append 1024 zero bytes"
        )
    if any(block):
        raise tarfile.ReadError(f"the header at byte {offset} is damaged")
    while block := raw.read(1 << 20):
        if any(block):
            raise tarfile.ReadError(
                f"data follows its end block at byte {offset}: a damaged tar, or several in one "
                "file (tar --concatenate joins them)"
            )


def _members(tar: tarfile.TarFile, where: str) -> dict[str, _Member]:
    members: dict[str, _Member] = {}
    for info in tar:
        if info.size < 0:  # tarfile would seek backwards and loop forever
            raise tarfile.ReadError(f"{short_name(info.name)} has {info.size} bytes")
        folder, slash, name = info.name.rpartition("/")
        stem, dot, suffix = name.partition(".")
        # Stock webdataset skips these, too, except hidden files in folders, as macOS's ._NAME.
        if not (stem and dot) or info.isdir() or METADATA.match(info.name):
            continue
        suffix = suffix.lower()
        is_image = suffix in IMAGE_SUFFIXES
        if not info.isreg() and not (is_image or suffix == "cls"):
            continue
        member = members.setdefault(f"{folder}{slash}{stem}", _Member())
        if not info.isreg():
            member.add_unused(f"{info.name} ({LINKS.get(info.type, 'not a regular file')})")
        elif is_image:
            if member.offset is not None:
                raise UserError(f"{where}: {short_name(info.name)} is a second image of its sample")
            if info.issparse() or any(key.startswith(SPARSE) for key in info.pax_headers):
                raise UserError(
                    f"{where}: {short_name(info.name)} is sparse, its zeros are not in the tar: "
                    "make the tar without --sparse (-S)"
                )
            member.offset, member.length = info.offset_data, info.size
        elif suffix == "cls":
            if member.label is not None:
                raise UserError(f"{where}: {short_name(info.name)} occurs twice")
            member.label = _label(tar, info, where)
        else:
            member.add_unused(info.name if "." in suffix else sys.intern(f".{suffix}"))
    return members


def _label(tar: tarfile.TarFile, info: tarfile.TarInfo, where: str) -> int:
    handle = tar.extractfile(info)
    text = handle.read(MAX_DIGITS + 1) if handle else b""
    if not text.strip().isdigit() or len(text) > MAX_DIGITS:
        raise UserError(
            f"{where}: {short_name(info.name)} is not a class number: it contains "
            f"'{short_name(text.decode(errors='replace'))}', expected digits only"
        )
    return int(text)
