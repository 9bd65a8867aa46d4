"""Files that finished images are written to, batch by batch, so that an interruption loses none.

``about.json`` in a folder describes its images. It is written first, because a folder that has
images and no ``about.json`` must be left alone: this command did not write it.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Any, Protocol

import fsspec
import numpy as np

from pipeline.sampling.batches import ImageBatch
from pipeline.sampling.worker import SampledBatch
from pipeline.storage.conditional import write_new
from pipeline.storage.files import (
    TEMPORARY,
    exists,
    file_size,
    is_local,
    list_folder,
    list_tree,
    open_url,
    publish,
    read_bytes,
    redact,
    remove,
    write_atomic,
)
from pipeline.storage.locks import LOCK, exclusive_lock
from pipeline.storage.npz import Archive, npy_bytes, npy_header, read_about, write_npz
from pipeline.text import short_value
from schemas.errors import UserError
from schemas.sample import ABOUT_FILE, CAPTIONS_FILE, LABELS_FILE, SampleAbout

PARTS = ".parts"


class Output(Protocol):
    """Destination of the images of one command. Methods raise ``UserError``."""

    @property
    def unfinished(self) -> str:
        """Folder of the images until all of them exist, for messages."""

    def lock(self) -> AbstractContextManager[None]:
        """Exclude other processes on this machine, or on any machine where the file system has
        locks. Object stores have none."""

    def read_info(self) -> SampleAbout | None:
        """Description of the existing images; None where it is absent or not readable."""

    def is_finished(self) -> bool:
        """True where an earlier command has completed the files."""

    def open(self, info: SampleAbout) -> None:
        """Write the description of the images to come; raises where other images exist."""

    def missing(self, batches: Sequence[ImageBatch]) -> list[ImageBatch]:
        """Batches of which an image is missing."""

    def write(self, sampled: SampledBatch) -> None:
        """Write the images of one batch."""

    def finish(self, batches: Sequence[ImageBatch], labels: Sequence[int] | Sequence[str]) -> None:
        """Complete the files, after all batches have been written, and remove temporary ones.
        ``labels`` are the class or the caption of each image."""


class NpzOutput:
    """One .npz file; until it is complete, its batches are files in the folder NPZ.parts."""

    def __init__(self, url: str) -> None:
        self.url, self.shown = url, redact(url)
        self.filesystem, self.path = open_url(url, what="--npz")
        self.parts = self.path + PARTS
        self.unfinished = self.shown + PARTS
        self.done = False

    def lock(self) -> AbstractContextManager[None]:
        if not is_local(self.filesystem) or self.is_finished():
            return nullcontext()
        what = f"--npz '{self.shown}'"
        return exclusive_lock(Path(self.parts), what=what, remedy="name another --npz")

    def read_info(self) -> SampleAbout | None:
        if not self.is_finished():
            return SampleAbout.parse_or_none(_read_info(self.filesystem, self.parts))
        return SampleAbout.parse_or_none(self._info_of_file())

    def is_finished(self) -> bool:
        try:
            file_size(self.filesystem, self.path)
        except FileNotFoundError:
            return False
        return True

    def open(self, info: SampleAbout) -> None:
        self.info = info
        self.done = self._check_file()
        if not self.done:
            remedy = f"give the old options, another --npz, or delete '{self.unfinished}'"
            _claim_folder(self.filesystem, self.parts, info, self.unfinished, remedy)

    def missing(self, batches: Sequence[ImageBatch]) -> list[ImageBatch]:
        if self.done:
            return []
        files = list_tree(self.filesystem, self.parts)
        sizes = {path.rpartition("/")[2]: size for path, size in files.items()}
        return [batch for batch in batches if sizes.get(_part(batch)) != self._size(batch)]

    def write(self, sampled: SampledBatch) -> None:
        if not self.done:
            path = f"{self.parts}/{_part(sampled.batch)}"
            write_atomic(self.filesystem, path, npy_bytes(sampled.images))

    def finish(self, batches: Sequence[ImageBatch], labels: Sequence[int] | Sequence[str]) -> None:
        if not self.done:
            with tempfile.TemporaryDirectory(prefix="haste-npz-") as scratch:
                # on the disk of the final file, so that publishing it is a rename
                folder = Path(self.parts if is_local(self.filesystem) else scratch)
                local = folder / f"{TEMPORARY}whole"
                size = self.info.image_size
                write_npz(
                    local,
                    (self.info.num, size, size, 3),
                    self._pieces(batches),
                    np.array(labels, np.int64 if self.info.text is None else np.str_),
                    self.info.model_dump(mode="json"),
                )
                publish(self.filesystem, local, self.path)
            self.done = True
        self._remove_parts()

    def _remove_parts(self) -> None:
        """Delete the batches, then ``about.json``: without it the rest would not be recognised."""
        paths = list_folder(self.filesystem, self.parts)
        for path in sorted(paths, key=lambda path: path.endswith(f"/{ABOUT_FILE}")):
            remove(self.filesystem, path)
        if paths and is_local(self.filesystem):
            with suppress(OSError):  # another command may have deleted it, or started again
                Path(self.parts).rmdir()

    def _check_file(self) -> bool:
        """True where the .npz file exists. Raises ``UserError`` where it has other images."""
        if not self.is_finished():
            return False
        remedy = "name another --npz, or delete it"
        values = self._info_of_file()
        if not values:
            raise UserError(
                f"--npz '{self.shown}' exists and was not written by this command; {remedy}"
            )
        check_same_images(values, self.info, where=self.shown, remedy=remedy)
        return True

    def _info_of_file(self) -> dict[str, Any]:
        """Empty where the file is damaged or not this command's."""
        try:
            return read_about(Archive(self.url, "--npz"))
        except UserError:
            return {}

    def _pieces(self, batches: Sequence[ImageBatch]) -> Iterator[bytes]:
        for batch in batches:
            shown = f"'{self.unfinished}/{_part(batch)}'"
            try:
                data = read_bytes(self.filesystem, f"{self.parts}/{_part(batch)}")
            except FileNotFoundError:
                raise UserError(
                    f"{shown} is missing, perhaps deleted by another command that writes --npz "
                    f"'{self.shown}': after that has ended, run the same command again"
                ) from None
            header = npy_header(self._shape(batch))
            if len(data) != self._size(batch) or not data.startswith(header):
                raise UserError(f"{shown} is damaged: delete it and run the same command again")
            yield data[len(header) :]

    def _shape(self, batch: ImageBatch) -> tuple[int, int, int, int]:
        return (batch.count, self.info.image_size, self.info.image_size, 3)

    def _size(self, batch: ImageBatch) -> int:
        shape = self._shape(batch)
        return len(npy_header(shape)) + int(np.prod(shape, dtype=np.int64))


class FolderOutput:
    """A folder of PNG files."""

    def __init__(self, url: str) -> None:
        self.shown = redact(url)
        self.unfinished = self.shown
        self.filesystem, self.path = open_url(url, what="--folder")

    def lock(self) -> AbstractContextManager[None]:
        if not is_local(self.filesystem):
            return nullcontext()
        what = f"--folder '{self.shown}'"
        return exclusive_lock(Path(self.path), what=what, remedy="name another --folder")

    def read_info(self) -> SampleAbout | None:
        return SampleAbout.parse_or_none(_read_info(self.filesystem, self.path))

    def is_finished(self) -> bool:
        files = (LABELS_FILE, CAPTIONS_FILE)
        return any(exists(self.filesystem, f"{self.path}/{name}") for name in files)

    def open(self, info: SampleAbout) -> None:
        self.info = info
        remedy = "give the old options, or another --folder"
        _claim_folder(self.filesystem, self.path, info, self.shown, remedy)

    def missing(self, batches: Sequence[ImageBatch]) -> list[ImageBatch]:
        files = {path.rpartition("/")[2] for path in list_folder(self.filesystem, self.path)}
        return [batch for batch in batches if not files.issuperset(self._names(batch))]

    def write(self, sampled: SampledBatch) -> None:
        for name, png in zip(self._names(sampled.batch), sampled.pngs, strict=True):
            write_atomic(self.filesystem, f"{self.path}/{name}", png)

    def finish(self, batches: Sequence[ImageBatch], labels: Sequence[int] | Sequence[str]) -> None:
        if self.info.text is None:
            name, data = LABELS_FILE, npy_bytes(np.array(labels, np.int64))
        else:
            files = (file for batch in batches for file in self._names(batch))
            rows = ({"file": f, "captions": [c]} for f, c in zip(files, labels, strict=True))
            name = CAPTIONS_FILE
            data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
        write_atomic(self.filesystem, f"{self.path}/{name}", data)
        for path in list_folder(self.filesystem, self.path):
            name = path.rpartition("/")[2]
            if name.startswith(TEMPORARY) and name != LOCK:  # left by a process that died
                remove(self.filesystem, path)

    def _names(self, batch: ImageBatch) -> list[str]:
        digits = max(6, len(str(self.info.num - 1)))
        return [f"{n:0{digits}d}.png" for n in range(batch.first, batch.last + 1)]


IGNORED = {"checkpoint", "version", "text.captions", "text.truncated"}
"""Places of weights and captions, whose checksums decide instead, software version, and counts."""


def check_same_images(values: Any, requested: SampleAbout, *, where: str, remedy: str) -> None:
    """Raises ``UserError`` naming the differences between the images at ``where``, which ``values``
    describe, and the requested ones."""
    existing = SampleAbout.parse_or_none(values)
    if existing is None:
        raise UserError(f"'{where}' has a description that this version cannot read; {remedy}")
    one, other = _leaves(existing), _leaves(requested)
    differing = [key for key in {**one, **other} if one.get(key) != other.get(key)]
    if differing:
        differences = [
            f"{key} {short_value(one.get(key), 40)} (now {short_value(other.get(key), 40)})"
            for key in differing
        ]
        if "weights_sha256" in differing:
            differences.append(f"they are from --checkpoint {existing.checkpoint}")
        raise UserError(f"'{where}' has other images: {', '.join(differences)}; {remedy}")


def are_same_images(one: SampleAbout, other: SampleAbout) -> bool:
    return _leaves(one) == _leaves(other)


def _part(batch: ImageBatch) -> str:
    return f"{batch.first:09d}.npy"


def _claim_folder(
    filesystem: fsspec.AbstractFileSystem,
    folder: str,
    info: SampleAbout,
    shown: str,
    remedy: str,
) -> None:
    """Write ``about.json``, which marks a folder as this command's. Raises ``UserError`` where the
    folder has other files or images."""
    values = _read_info(filesystem, folder)
    if values is None:
        names = (path.rpartition("/")[2] for path in list_folder(filesystem, folder))
        if any(not name.startswith(TEMPORARY) for name in names):
            raise UserError(
                f"'{shown}' has files and no {ABOUT_FILE}, so this command did not write it: "
                "name an empty or a new folder"
            )
        text = info.model_dump_json(indent=1) + "\n"
        if write_new(filesystem, f"{folder}/{ABOUT_FILE}", text.encode()):
            return
        values = _read_info(filesystem, folder)  # of a command that began at the same time
    check_same_images(values, info, where=shown, remedy=remedy)


def _read_info(filesystem: fsspec.AbstractFileSystem, folder: str) -> Any:
    """Values in ``about.json``; {} where it is not JSON, None where there is no such file."""
    try:
        return json.loads(read_bytes(filesystem, f"{folder}/{ABOUT_FILE}")) or {}
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError):
        return {}


def _leaves(info: SampleAbout) -> dict[str, Any]:
    values = info.model_dump(mode="json")
    for table in ("sampler", "text"):
        values |= {f"{table}.{key}": value for key, value in values.pop(table, {}).items()}
    return {key: value for key, value in values.items() if key not in IGNORED}
