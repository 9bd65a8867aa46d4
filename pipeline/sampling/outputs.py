"""Where finished images go: each block on its own, so that an interruption loses none.

A folder says in ``about.json`` what its images are. It is written first: a folder with images and
without it belongs to somebody else.
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
from pydantic import ValidationError

from pipeline.sampling.batches import ImageBatch
from pipeline.sampling.worker import SampledBatch
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
from schemas.sample import ABOUT_FILE, LABELS_FILE, SampleAbout

PARTS = ".parts"


class Output(Protocol):
    """Images that are to be complete one day. Methods raise ``UserError``."""

    @property
    def unfinished(self) -> str:
        """Where images wait until all of them are there, for people."""

    def alone(self) -> AbstractContextManager[None]:
        """Keep other processes of this machine, or of a disk that knows locks, away. Object stores
        know none."""

    def found(self) -> SampleAbout | None:
        """What images that are there say of themselves, if that is something."""

    def is_finished(self) -> bool:
        """Whether a command has come to its end here."""

    def open(self, about: SampleAbout) -> None:
        """Say what the images are; refuse where images are there that are others."""

    def missing(self, blocks: Sequence[ImageBatch]) -> list[ImageBatch]:
        """Those that are not there in whole."""

    def write(self, drawn: SampledBatch) -> None:
        """Keep one block."""

    def finish(self, blocks: Sequence[ImageBatch], labels: Sequence[int]) -> None:
        """All blocks have been written: leave what was asked for, and nothing else."""


class NpzOutput:
    """One .npz file; its blocks wait in a folder beside it."""

    def __init__(self, url: str) -> None:
        self.url, self.shown = url, redact(url)
        self.filesystem, self.path = open_url(url, what="--npz")
        self.parts = self.path + PARTS
        self.unfinished = self.shown + PARTS
        self.done = False

    def alone(self) -> AbstractContextManager[None]:
        if not is_local(self.filesystem) or self.is_finished():
            return nullcontext()
        what = f"--npz '{self.shown}'"
        return exclusive_lock(Path(self.parts), what=what, remedy="name another --npz")

    def found(self) -> SampleAbout | None:
        if not self.is_finished():
            return _known(_about_in(self.filesystem, self.parts))
        return _known(self._about_of_file())

    def is_finished(self) -> bool:
        try:
            file_size(self.filesystem, self.path)
        except FileNotFoundError:
            return False
        return True

    def open(self, about: SampleAbout) -> None:
        self.about = about
        self.done = self._is_there()
        if not self.done:
            remedy = f"give the old options, another --npz, or delete '{self.unfinished}'"
            _claim(self.filesystem, self.parts, about, self.unfinished, remedy)

    def missing(self, blocks: Sequence[ImageBatch]) -> list[ImageBatch]:
        if self.done:
            return []
        there = list_tree(self.filesystem, self.parts)
        sizes = {path.rpartition("/")[2]: size for path, size in there.items()}
        return [block for block in blocks if sizes.get(_part(block)) != self._size(block)]

    def write(self, drawn: SampledBatch) -> None:
        if not self.done:
            path = f"{self.parts}/{_part(drawn.block)}"
            write_atomic(self.filesystem, path, npy_bytes(drawn.images))

    def finish(self, blocks: Sequence[ImageBatch], labels: Sequence[int]) -> None:
        if not self.done:
            with tempfile.TemporaryDirectory(prefix="haste-npz-") as scratch:
                # where it can be renamed, on the disk that it is for
                folder = Path(self.parts if is_local(self.filesystem) else scratch)
                local = folder / f"{TEMPORARY}whole"
                size = self.about.image_size
                write_npz(
                    local,
                    (self.about.num, size, size, 3),
                    self._pieces(blocks),
                    np.array(labels, np.int64),
                    self.about.model_dump(mode="json"),
                )
                publish(self.filesystem, local, self.path)
            self.done = True
        _remove_folder(self)

    def _is_there(self) -> bool:
        if not self.is_finished():
            return False
        remedy = "name another --npz, or delete it"
        found = self._about_of_file()
        if not found:
            raise UserError(
                f"--npz '{self.shown}' is there already, and no file of this command; {remedy}"
            )
        check_same_images(found, self.about, where=self.shown, remedy=remedy)
        return True

    def _about_of_file(self) -> dict[str, Any]:
        """Empty where it is nobody's or damaged."""
        try:
            return read_about(Archive(self.url, "--npz"))
        except UserError:
            return {}

    def _pieces(self, blocks: Sequence[ImageBatch]) -> Iterator[bytes]:
        for block in blocks:
            shown = f"'{self.unfinished}/{_part(block)}'"
            try:
                data = read_bytes(self.filesystem, f"{self.parts}/{_part(block)}")
            except FileNotFoundError:
                raise UserError(
                    f"{shown} has gone, maybe with another command that writes --npz "
                    f"'{self.shown}': once that has ended, run the same command again"
                ) from None
            header = npy_header(self._shape(block))
            if len(data) != self._size(block) or not data.startswith(header):
                raise UserError(f"{shown} is damaged: delete it and run the same command again")
            yield data[len(header) :]

    def _shape(self, block: ImageBatch) -> tuple[int, int, int, int]:
        return (block.count, self.about.image_size, self.about.image_size, 3)

    def _size(self, block: ImageBatch) -> int:
        shape = self._shape(block)
        return len(npy_header(shape)) + int(np.prod(shape, dtype=np.int64))


class FolderOutput:
    """A folder of PNG files."""

    def __init__(self, url: str) -> None:
        self.shown = redact(url)
        self.unfinished = self.shown
        self.filesystem, self.path = open_url(url, what="--folder")

    def alone(self) -> AbstractContextManager[None]:
        if not is_local(self.filesystem):
            return nullcontext()
        what = f"--folder '{self.shown}'"
        return exclusive_lock(Path(self.path), what=what, remedy="name another --folder")

    def found(self) -> SampleAbout | None:
        return _known(_about_in(self.filesystem, self.path))

    def is_finished(self) -> bool:
        return exists(self.filesystem, f"{self.path}/{LABELS_FILE}")

    def open(self, about: SampleAbout) -> None:
        self.about = about
        remedy = "give the old options, or another --folder"
        _claim(self.filesystem, self.path, about, self.shown, remedy)

    def missing(self, blocks: Sequence[ImageBatch]) -> list[ImageBatch]:
        there = {path.rpartition("/")[2] for path in list_folder(self.filesystem, self.path)}
        return [block for block in blocks if not there.issuperset(self._names(block))]

    def write(self, drawn: SampledBatch) -> None:
        for name, png in zip(self._names(drawn.block), drawn.pngs, strict=True):
            write_atomic(self.filesystem, f"{self.path}/{name}", png)

    def finish(self, blocks: Sequence[ImageBatch], labels: Sequence[int]) -> None:
        numbers = npy_bytes(np.array(labels, np.int64))
        write_atomic(self.filesystem, f"{self.path}/{LABELS_FILE}", numbers)
        for path in list_folder(self.filesystem, self.path):
            name = path.rpartition("/")[2]
            if name.startswith(TEMPORARY) and name != LOCK:  # something died over it
                remove(self.filesystem, path)

    def _names(self, block: ImageBatch) -> list[str]:
        digits = max(6, len(str(self.about.num - 1)))
        return [f"{n:0{digits}d}.png" for n in range(block.first, block.first + block.count)]


def _part(block: ImageBatch) -> str:
    return f"{block.first:09d}.npy"


def _claim(
    filesystem: fsspec.AbstractFileSystem,
    folder: str,
    about: SampleAbout,
    shown: str,
    remedy: str,
) -> None:
    """Have ``about.json`` in a folder. Raises ``UserError`` where it is used for something else."""
    found = _about_in(filesystem, folder)
    if found is None:
        names = (path.rpartition("/")[2] for path in list_folder(filesystem, folder))
        if any(not name.startswith(TEMPORARY) for name in names):
            raise UserError(
                f"'{shown}' has files and no {ABOUT_FILE}, so that it is not this command's: "
                "name an empty or a new folder"
            )
        text = about.model_dump_json(indent=1) + "\n"
        write_atomic(filesystem, f"{folder}/{ABOUT_FILE}", text.encode())
        return
    check_same_images(found, about, where=shown, remedy=remedy)


def _about_in(filesystem: fsspec.AbstractFileSystem, folder: str) -> Any:
    """What ``about.json`` says, {} where that is no JSON, None where there is no such file."""
    try:
        return json.loads(read_bytes(filesystem, f"{folder}/{ABOUT_FILE}")) or {}
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError):
        return {}


def _known(found: Any) -> SampleAbout | None:
    try:
        return SampleAbout.model_validate(found)
    except ValidationError:
        return None


def _remove_folder(output: NpzOutput) -> None:
    """The blocks, ``about.json`` last: without it the rest would be a stranger's."""
    paths = list_folder(output.filesystem, output.parts)
    for path in sorted(paths, key=lambda path: path.endswith(f"/{ABOUT_FILE}")):
        remove(output.filesystem, path)
    if paths and is_local(output.filesystem):
        with suppress(OSError):  # another command may do the same, or have begun anew
            Path(output.parts).rmdir()


MAY_DIFFER = {"checkpoint", "version"}
"""Where the weights lay, and what drew: the weights' checksum tells whether they are the same."""


def check_same_images(found: Any, wanted: SampleAbout, *, where: str, remedy: str) -> None:
    """Raises ``UserError`` that says in which respects images at ``where``, which say ``found`` of
    themselves, differ from those that are ``wanted``."""
    there = SampleAbout.parse_or_none(found)
    if there is None:
        raise UserError(
            f"'{where}' does not say in a way that this version knows what it is; {remedy}"
        )
    one, other = _leaves(there), _leaves(wanted)
    differing = [key for key in other if one[key] != other[key]]
    if differing:
        said = [
            f"{key} {short_value(one[key], 40)} (now {short_value(other[key], 40)})"
            for key in differing
        ]
        if "weights_sha256" in differing:
            said.append(f"they are from --checkpoint {there.checkpoint}")
        raise UserError(f"'{where}' is of other images: {', '.join(said)}; {remedy}")


def are_same_images(one: SampleAbout, other: SampleAbout) -> bool:
    return _leaves(one) == _leaves(other)


def _leaves(about: SampleAbout) -> dict[str, Any]:
    values = about.model_dump(mode="json", exclude=MAY_DIFFER)
    sampler = values.pop("sampler")
    return values | {f"sampler.{key}": value for key, value in sampler.items()}
