"""Images in WebDataset tars: NAME.jpg (or png, webp, ...) and NAME.cls for each sample, or in
img2dataset's tars captions in NAME.txt or NAME.json.

Members are read as stock webdataset reads them: a name ends at its first dot, suffixes may have
capitals, and metadata (``__NAME__``), members without a suffix, folders and links are skipped. A
sample that loses its image or its class that way is refused, and so is a tar that is not complete,
because stock webdataset reads fewer samples then and reports nothing.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import tarfile
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import BinaryIO

from pipeline.datasets.captions import captioned_listing, parse_captions
from pipeline.datasets.folder import escape_dots, list_files
from pipeline.datasets.listing import ImageItem, Listing, numbered_listing
from pipeline.datasets.listing_check import short_name
from pipeline.datasets.tar_source import choose_tars, expand_pattern, split_pattern
from pipeline.storage.files import is_local, open_url, redact, retrying
from pipeline.storage.redaction import without_secrets
from schemas.errors import UserError, plain_text

IMAGE_SUFFIXES = frozenset({"jpg", "jpeg", "png", "webp", "ppm", "pgm", "pbm", "pnm", "bmp"})

CAPTION_SUFFIXES = ("txt", "json")
MAX_CAPTION_BYTES = 1 << 20  # of a .txt or .json member
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
    texts: dict[str, list[str]] = field(default_factory=dict)
    """Captions by suffix, 'txt' or 'json', where they are read."""

    def add_unused(self, name: str) -> None:
        if len(self.unused) < MAX_NAMED:
            self.unused += (name,)


def list_tars(source: str, captions: str | None = None) -> Listing:
    """List all samples of all tars of ``source``: a folder, one tar, or a pattern of tars.

    ``captions`` names the suffix of the members with captions. By default samples have captions,
    in .txt or else .json, if none of the first tar with samples has a .cls; they need no .cls then,
    and all are of class 0. Raises ``UserError``.
    """
    root, pattern = split_pattern(source)
    shown = redact(root)
    if pattern:
        paths = list(expand_pattern(source, root, pattern))
    else:
        paths = [""] if HTTP_TAR.fullmatch(root) else list_files(root)  # a page lists no such file
    samples: list[tuple[str, str, _Member]] = []
    suffixes: tuple[str, ...] = () if captions is None else (captions,)
    for path in choose_tars(source, paths):
        found = _scan(root, path, suffixes)
        if not samples and not suffixes and _has_captions(found):
            suffixes = CAPTION_SUFFIXES
            found = _scan(root, path, suffixes)
        if not found:
            logger.warning("%s has no samples", plain_text(f"{shown}/{path}".rstrip("/")))
        samples += [(path, key, member) for key, member in found.items()]
    if not samples:
        raise UserError(f"--source '{redact(source)}' has no samples")
    repeated = {key for key, count in Counter(key for _, key, _ in samples).items() if count > 1}
    unlabelled = bool(suffixes) and all(member.label is None for _, _, member in samples)
    items, missing = [], []
    for path, key, member in samples:
        linked = any(name.endswith(" link)") for name in member.unused)
        if member.offset is None and suffixes and member.label is None and not linked:
            missing.append(f"{path}: sample '{key}'")
            continue
        if member.offset is None or (member.label is None and not unlabelled):
            raise UserError(f"{shown}/{path}".rstrip("/") + f": {_incomplete(key, member)}")
        name = f"{escape_dots(path)}/{key}" if key in repeated else key
        item = ImageItem(name, member.label or 0, path, member.offset, member.length)
        texts = (member.texts[suffix] for suffix in suffixes if suffix in member.texts)
        items.append((item, next(texts, [])))
    if not suffixes:
        return numbered_listing([item for item, _ in items], redact(source))
    captioned = captioned_listing(items, missing, redact(source))
    if unlabelled:
        return captioned
    return replace(numbered_listing(captioned.items, redact(source)), captions=captioned.captions)


def _has_captions(found: Mapping[str, _Member]) -> bool:
    """True if the samples of a tar have .txt or .json members and no class."""
    members = list(found.values())
    if any(member.label is not None for member in members):
        return False
    suffixes = {f".{suffix}" for suffix in CAPTION_SUFFIXES}
    return any(suffixes.intersection(member.unused) for member in members)


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


def _scan(source: str, path: str, captions: Collection[str] = ()) -> dict[str, _Member]:
    """Samples of one tar by key. Headers, .cls members and those with the suffixes ``captions`` are
    read, images are not. Raises ``UserError``."""
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
                members = _members(tar, where, captions)
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


def _members(
    tar: tarfile.TarFile, where: str, captions: Collection[str] = ()
) -> dict[str, _Member]:
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
        elif suffix in captions:
            if suffix in member.texts:
                raise UserError(f"{where}: {short_name(info.name)} occurs twice")
            member.texts[suffix] = _captions(tar, info, suffix, where)
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


def _captions(tar: tarfile.TarFile, info: tarfile.TarInfo, suffix: str, where: str) -> list[str]:
    """Captions of a .txt member, which is one, or of a .json member with the key caption, as
    img2dataset writes it, or captions."""
    name = f"{where}: {short_name(info.name)}"
    if info.size > MAX_CAPTION_BYTES:
        raise UserError(f"{name} has {info.size} bytes; the limit is {MAX_CAPTION_BYTES}")
    handle = tar.extractfile(info)
    try:
        text = (handle.read() if handle else b"").decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{name} is not text in UTF-8") from None
    if suffix == "txt":
        return [text.rstrip("\r\n")]
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        raise UserError(f"{name} is not JSON") from None
    if not isinstance(content, dict):
        raise UserError(f"{name} is not a JSON object")
    captions = parse_captions(content.get("captions", content.get("caption")))
    if captions is None:
        raise UserError(f"{name}: its caption is not a text or a list of texts")
    return captions
