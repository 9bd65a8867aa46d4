"""Layout of a source: the options with which ``pipeline.extract`` lists its images.

A layout that the extraction cannot list (compressed tars, tars without classes, arrays of CIFAR and
MNIST) is unpacked once, into the folder ``images`` of the work folder.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import tarfile
import tempfile
import zipfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.datasets.folder import list_class_names, list_files
from pipeline.datasets.imagenet import WNID
from pipeline.quickstart.arrays import ARRAY_FILES, write_arrays
from pipeline.storage.files import TEMPORARY, exists, is_local, open_url, redact
from pipeline.storage.filesystem import absolute_url
from pipeline.text import counted
from schemas.errors import UserError, plain_text
from schemas.extract import Dataset

logger = logging.getLogger(__name__)

SUFFIXES = frozenset(
    {"jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm", "pgm", "pbm", "jp2", "avif"}
)
"""Suffixes of images; files of other suffixes count where a source has none of these."""
TRAINING = ("train", "training", "train_set", "training_set")
SPLITS = frozenset({*TRAINING, "test", "testing", "val", "valid", "validation", "dev", "eval"})
COMPRESSED = re.compile(r"\.(tgz|tbz2?|txz|tar\.(gz|bz2|xz))$", re.IGNORECASE)
MARK = ".unpacked-from"
"""Hidden file in the folder of unpacked images: the source that they are from."""
NO_TEXT = {"text": {"keep": "none"}}
WITHOUT_TEXT = {"text": "captions need a text encoder, and a student of another family"}
MAX_DEPTH = 8
"""Folders that are looked into for the one that holds the classes."""


@dataclass(frozen=True)
class Layout:
    """Options of the extraction that say where the images are."""

    dataset: Dataset
    source: str
    reasons: dict[str, str]
    """Reason of each option, by its name."""
    options: dict[str, Any] = field(default_factory=dict)
    """Further options of the extraction."""


def find_layout(source: str, work: Path) -> Layout:
    """Look at ``source``. Raises ``UserError`` where it holds no images."""
    filesystem, root = open_url(source, what="--source")
    if not exists(filesystem, root):
        raise UserError(f"--source '{redact(source)}' does not exist")
    source = absolute_url(source)
    if not is_local(filesystem):
        return _of_folder(source, work)
    path = Path(source)
    if path.is_file():
        return _of_file(path, work)
    names = sorted(p.name for p in path.iterdir() if not p.name.startswith("."))
    if len(names) == 1 and (path / names[0]).is_file() and _is_archive(names[0]):
        return _of_file(path / names[0], work)
    packed = [name for name in names if COMPRESSED.search(name)]
    tars = [name for name in names if name.lower().endswith(".tar")]
    if packed or tars:
        return _of_tars(path, sorted(packed + tars), bool(packed), work)
    return _of_folder(source, work)


def _is_archive(name: str) -> bool:
    return name.lower().endswith((".zip", ".tar")) or COMPRESSED.search(name) is not None


def _of_file(path: Path, work: Path) -> Layout:
    name = path.name
    if name.lower().endswith(".zip"):
        _check_zip(path)
        return _of_folder(f"zip://::{path}", work)
    if COMPRESSED.search(name) or name.lower().endswith(".tar"):
        return _of_tars(path, [""], COMPRESSED.search(name) is not None, work)
    raise UserError(
        f"--source '{path}' is a file: expected a folder, a .zip, a .tar or a compressed tar"
    )


def _check_zip(path: Path) -> None:
    """Raises ``UserError`` for a damaged zip, and for one with a password."""
    try:
        with zipfile.ZipFile(path) as archive:
            locked = next((info for info in archive.infolist() if info.flag_bits & 1), None)
    except (OSError, zipfile.BadZipFile) as error:
        raise UserError(f"--source '{path}' is not a readable zip ({error})") from None
    if locked is not None:
        raise UserError(f"--source '{path}' has a password: unpack it and give the folder")


def _of_tars(path: Path, names: list[str], compressed: bool, work: Path) -> Layout:
    """Tars of WebDataset where they are, others unpacked."""
    if not compressed:
        from pipeline.datasets.tar_shards import list_tars

        try:
            captioned = list_tars(str(path)).captions is not None
        except UserError as error:
            logger.info("tars without classes in .cls members are unpacked (%s)", error)
        else:
            kind = f"tars with {'captions' if captioned else '.cls members'}, as webdataset's"
            reasons = {"dataset": kind, "source": "read in place"}
            if captioned:
                return Layout("webdataset", str(path), reasons | WITHOUT_TEXT, dict(NO_TEXT))
            return Layout("webdataset", str(path), reasons)
    tars = [path / name if name else path for name in names]

    def unpack(folder: Path) -> None:
        for tar in tars:
            _extract(tar, folder if len(tars) == 1 else folder / tar.name.split(".")[0])

    return _of_folder(str(_unpacked(str(path), work, unpack)), work, unpacked=True)


def _extract(tar: Path, folder: Path) -> None:
    try:
        with tarfile.open(tar) as archive:
            archive.extractall(folder, filter="data")
    except (OSError, tarfile.TarError, EOFError) as error:
        raise UserError(
            f"--source: '{tar}' cannot be unpacked ({plain_text(str(error))})"
        ) from None


def _unpacked(source: str, work: Path, write: Callable[[Path], None]) -> Path:
    """The folder that ``write`` fills, once. Raises ``UserError`` if another source was unpacked
    there."""
    final = work / "images"
    if final.exists():
        mark = final / MARK
        if not mark.exists() or mark.read_text(encoding="utf-8") != source:
            raise UserError(
                f"'{final}' holds other images than those of --source: use another --work"
            )
        return final
    work.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=TEMPORARY, dir=work))
    try:
        logger.info("unpacking '%s' to '%s'", source, final)
        write(temporary)
        (temporary / MARK).write_text(source, encoding="utf-8")
        os.chmod(temporary, 0o755)
        os.replace(temporary, final)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return final


def _of_folder(source: str, work: Path, *, unpacked: bool = False) -> Layout:
    """The layout of a folder, a URL or an opened archive."""
    paths = [path for path in list_files(source) if not path.startswith("__MACOSX/")]
    if not paths:
        raise UserError(f"--source '{redact(source)}' has no files")
    where = "unpacked from --source" if unpacked else "as given"
    folders = {path.split("/", 1)[0] for path in paths if "/" in path}
    if {"train2014", "annotations"} <= folders:
        return Layout(
            "coco",
            source,
            {"dataset": "train2014/ and annotations/ are MS-COCO's", "source": where}
            | WITHOUT_TEXT,
            dict(NO_TEXT),
        )
    if {"images", "vae-sd"} <= folders:
        raise UserError(
            f"--source '{redact(source)}' is prepared for REPA, with latents of its own: use "
            "python -m pipeline.extract --dataset repa and a config of jobs/configs"
        )
    if not any(_is_image(path) for path in paths):
        arrays = [path for path in paths if ARRAY_FILES.fullmatch(path.rpartition("/")[2])]
        if arrays:
            found = _unpacked(source, work, lambda folder: write_arrays(source, arrays, folder))
            return _of_folder(str(found), work, unpacked=True)
        inner = [path for path in paths if _is_archive(path)]
        if inner:
            raise UserError(
                f"--source '{redact(source)}' holds no images but "
                f"{counted(len(inner), 'archive')}, first '{inner[0]}': "
                f"{_advice_for_archives(source, inner)}"
            )
    return _of_classes(source, paths, where)


def _advice_for_archives(source: str, paths: list[str]) -> str:
    """A source that is read in place of one that holds only the archives ``paths``."""
    folders = {path.rpartition("/")[0] for path in paths}
    if "://" in source:
        return "unpack them and give the folder"
    if len(folders) == 1 and folders != {""} and all(path.endswith(".tar") for path in paths):
        return f"give --source '{source.rstrip('/')}/{folders.pop()}'"
    return "give one of them, or unpack all into one folder"


def _of_classes(source: str, paths: list[str], where: str) -> Layout:
    """The folder whose folders are the classes; or images without classes."""
    images = [path for path in paths if _is_image(path)] or paths
    below, notes = "", [where]
    for _ in range(MAX_DEPTH):
        inside = [path for path in images if "/" in path]
        folders = Counter(path.split("/", 1)[0] for path in inside)
        names = {name.lower(): name for name in sorted(folders, reverse=True)}
        training = next((names[name] for name in TRAINING if name in names), None)
        split = training is not None and set(names) <= SPLITS
        deeper = all(path.count("/") >= 2 for path in inside)
        if not inside or len(inside) < len(images) - len(inside):
            break
        if split and training is not None:
            chosen = training
            notes.append(f"folder '{chosen}' of the splits {', '.join(sorted(folders))}")
        elif len(folders) == 1 and deeper and len(inside) == len(images):
            (chosen,) = folders
            notes.append(f"folder '{chosen}' holds all class folders")
        else:
            return _labelled(_joined(source, below), notes, folders)
        below = f"{below}/{chosen}".strip("/")
        images = [p.partition("/")[2] for p in inside if p.startswith(f"{chosen}/")]
    reasons = {
        "dataset": "images in one folder",
        "source": "; ".join(notes),
        "unlabelled": "the images are in no class folders: all are of one class",
    }
    return Layout("folder", _joined(source, below), reasons, {"unlabelled": True})


def _labelled(source: str, notes: list[str], folders: Counter[str]) -> Layout:
    empty = sorted(set(list_class_names(source)) - set(folders) - {"__MACOSX"})
    wnids = all(WNID.fullmatch(name) for name in folders) and not empty
    reasons = {
        "dataset": "class folders with ImageNet's names" if wnids else "one folder for each class",
        "source": "; ".join(notes),
    }
    options: dict[str, Any] = {}
    if empty:
        options["allow_empty_classes"] = True
        reasons["allow_empty_classes"] = (
            f"{len(empty)} class folders have no images ('{empty[0]}' first)"
        )
    return Layout("imagenet" if wnids else "folder", source, reasons, options)


def _joined(source: str, below: str) -> str:
    """``below`` a folder or a URL, also of an archive."""
    if not below:
        return source
    inner, chain, outer = source.partition("::")
    if chain and inner.endswith("://"):
        return f"{inner}{below}::{outer}"
    return f"{inner.rstrip('/')}/{below}{chain}{outer}"


def _is_image(path: str) -> bool:
    name, dot, suffix = path.rpartition("/")[2].rpartition(".")
    return bool(name and dot) and suffix.lower() in SUFFIXES
