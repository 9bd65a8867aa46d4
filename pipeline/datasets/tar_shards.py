"""Images in WebDataset tars: NAME.jpg (or png, webp) and NAME.cls for each sample."""

from __future__ import annotations

import os
import tarfile
from collections import Counter
from dataclasses import dataclass

from pipeline.datasets.folder import escape_dots, list_files
from pipeline.datasets.listing import ImageItem, Listing, numbered_listing
from pipeline.datasets.listing_check import short_name
from pipeline.storage.files import is_local, open_url, redact, retrying
from pipeline.storage.redaction import without_secrets
from schemas.errors import UserError

IMAGE_SUFFIXES = frozenset({"jpg", "jpeg", "png", "webp", "ppm", "bmp"})

MAX_DIGITS = 32  # bytes of a .cls member


@dataclass
class _Member:
    label: int | None = None
    offset: int | None = None
    length: int = 0


def list_tars(source: str) -> Listing:
    """List all samples of all ``*.tar`` below ``source``, which may also be one tar. Raises
    ``UserError``."""
    shown = redact(source)
    paths = [path for path in list_files(source) if path.endswith(".tar") or path == ""]
    if not paths:
        raise UserError(f"--source '{shown}' has no .tar files")
    samples = [(path, key, member) for path in paths for key, member in _scan(source, path).items()]
    repeated = {key for key, count in Counter(key for _, key, _ in samples).items() if count > 1}
    items = []
    for path, key, member in samples:
        where = f"{shown}/{path}".rstrip("/")
        if member.offset is None:
            raise UserError(f"{where}: sample '{short_name(key)}' has no image (jpg, png, webp)")
        if member.label is None:
            raise UserError(f"{where}: sample '{short_name(key)}' has no .cls")
        name = f"{escape_dots(path)}/{key}" if key in repeated else key
        items.append(ImageItem(name, member.label, path, member.offset, member.length))
    if not items:
        raise UserError(f"--source '{shown}' has no samples")
    return numbered_listing(items, shown)


def _scan(source: str, path: str) -> dict[str, _Member]:
    """Samples of one tar by key. Headers and .cls members are read, images are not. Raises
    ``UserError``."""
    filesystem, root = open_url(source, what="--source")
    tar_path = f"{root}/{path}".rstrip("/")
    where = f"{redact(source)}/{path}".rstrip("/")

    if is_local(filesystem) and not os.path.isfile(tar_path):  # reading a pipe might block forever
        raise UserError(f"{where}: cannot read this tar (not a regular file)")

    def scan() -> dict[str, _Member]:
        with (
            filesystem.open(tar_path, "rb") as raw,
            tarfile.open(fileobj=raw, mode="r:") as tar,
        ):
            return _members(tar, where)

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


def _members(tar: tarfile.TarFile, where: str) -> dict[str, _Member]:
    members: dict[str, _Member] = {}
    for info in tar:
        if info.size < 0:  # tarfile would seek backwards and loop forever
            raise tarfile.ReadError(f"{short_name(info.name)} has {info.size} bytes")
        if not info.isreg():
            continue
        folder, slash, name = info.name.rpartition("/")
        stem, _, suffix = name.partition(".")
        if not stem:  # hidden, such as macOS's ._NAME files
            continue
        member = members.setdefault(f"{folder}{slash}{stem}", _Member())
        if suffix.lower() in IMAGE_SUFFIXES:
            if member.offset is not None:
                raise UserError(f"{where}: {short_name(info.name)} is a second image of its sample")
            member.offset, member.length = info.offset_data, info.size
        elif suffix == "cls":
            if member.label is not None:
                raise UserError(f"{where}: {short_name(info.name)} occurs twice")
            member.label = _label(tar, info, where)
    return members


def _label(tar: tarfile.TarFile, info: tarfile.TarInfo, where: str) -> int:
    handle = tar.extractfile(info)
    text = handle.read(MAX_DIGITS + 1) if handle else b""
    if not text.strip().isdigit() or len(text) > MAX_DIGITS:
        raise UserError(f"{where}: {short_name(info.name)} is not a class number")
    return int(text)
