"""Where finished images go: each block on its own, so that an interruption loses none.

A folder says in ``about.json`` what its images are. It is written first: a folder with images and
without it belongs to somebody else.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import fsspec
import numpy as np

from pipeline.archive import Archive, read_about
from pipeline.files import (
    TEMPORARY,
    file_size,
    is_local,
    list_folder,
    list_tree,
    open_url,
    publish,
    read_bytes,
    remove,
    without_credentials,
    write_atomic,
)
from pipeline.sampling.blocks import Block
from pipeline.sampling.identity import check_same_images
from pipeline.sampling.npz import npy_bytes, npy_header, write_npz
from pipeline.sampling.worker import Drawn
from schemas.errors import UserError
from schemas.sample import ABOUT_FILE, LABELS_FILE, SampleAbout

PARTS = ".parts"


class Output(Protocol):
    """Images that are to be complete one day. Methods raise ``UserError``."""

    def open(self, about: SampleAbout) -> None:
        """Say what the images are; refuse where images are there that are others."""

    def missing(self, blocks: Sequence[Block]) -> list[Block]:
        """Those that are not there in whole."""

    def write(self, drawn: Drawn) -> None:
        """Keep one block."""

    def finish(self, blocks: Sequence[Block], labels: Sequence[int]) -> None:
        """All blocks have been written: leave what was asked for, and nothing else."""


class NpzOutput:
    """One .npz file; its blocks wait in a folder beside it."""

    def __init__(self, url: str) -> None:
        self.url, self.shown = url, without_credentials(url)
        self.filesystem, self.path = open_url(url, what="--npz")
        self.parts = self.path + PARTS
        self.done = False

    def open(self, about: SampleAbout) -> None:
        self.about = about
        self.done = self._is_there()
        if not self.done:
            remedy = f"give the old options, another --npz, or delete '{self.shown}{PARTS}'"
            _claim(self.filesystem, self.parts, about, self.shown + PARTS, remedy)

    def missing(self, blocks: Sequence[Block]) -> list[Block]:
        if self.done:
            return []
        there = list_tree(self.filesystem, self.parts)
        sizes = {path.rpartition("/")[2]: size for path, size in there.items()}
        return [block for block in blocks if sizes.get(_part(block)) != self._size(block)]

    def write(self, drawn: Drawn) -> None:
        if not self.done:
            path = f"{self.parts}/{_part(drawn.block)}"
            write_atomic(self.filesystem, path, npy_bytes(drawn.images))

    def finish(self, blocks: Sequence[Block], labels: Sequence[int]) -> None:
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
        try:
            file_size(self.filesystem, self.path)
        except FileNotFoundError:
            return False
        remedy = "name another --npz, or delete it"
        try:
            found = read_about(Archive(self.url, "--npz"))
        except UserError:
            found = {}
        if not found:
            raise UserError(
                f"--npz '{self.shown}' is there already, and no file of this command; {remedy}"
            )
        check_same_images(found, self.about, where=self.shown, remedy=remedy)
        return True

    def _pieces(self, blocks: Sequence[Block]) -> Iterator[bytes]:
        for block in blocks:
            data = read_bytes(self.filesystem, f"{self.parts}/{_part(block)}")
            header = npy_header(self._shape(block))
            if len(data) != self._size(block) or not data.startswith(header):
                raise UserError(
                    f"'{self.shown}{PARTS}/{_part(block)}' is damaged: delete it and run the same "
                    "command again"
                )
            yield data[len(header) :]

    def _shape(self, block: Block) -> tuple[int, int, int, int]:
        return (block.count, self.about.image_size, self.about.image_size, 3)

    def _size(self, block: Block) -> int:
        shape = self._shape(block)
        return len(npy_header(shape)) + int(np.prod(shape, dtype=np.int64))


class FolderOutput:
    """A folder of PNG files."""

    def __init__(self, url: str) -> None:
        self.shown = without_credentials(url)
        self.filesystem, self.path = open_url(url, what="--folder")

    def open(self, about: SampleAbout) -> None:
        self.about = about
        remedy = "give the old options, or another --folder"
        _claim(self.filesystem, self.path, about, self.shown, remedy)

    def missing(self, blocks: Sequence[Block]) -> list[Block]:
        there = {path.rpartition("/")[2] for path in list_folder(self.filesystem, self.path)}
        return [block for block in blocks if not there.issuperset(self._names(block))]

    def write(self, drawn: Drawn) -> None:
        for name, png in zip(self._names(drawn.block), drawn.pngs, strict=True):
            write_atomic(self.filesystem, f"{self.path}/{name}", png)

    def finish(self, blocks: Sequence[Block], labels: Sequence[int]) -> None:
        numbers = npy_bytes(np.array(labels, np.int64))
        write_atomic(self.filesystem, f"{self.path}/{LABELS_FILE}", numbers)
        for path in list_folder(self.filesystem, self.path):
            if path.rpartition("/")[2].startswith(TEMPORARY):  # something died over it
                remove(self.filesystem, path)

    def _names(self, block: Block) -> list[str]:
        digits = max(6, len(str(self.about.num - 1)))
        return [f"{n:0{digits}d}.png" for n in range(block.first, block.first + block.count)]


def _part(block: Block) -> str:
    return f"{block.first:09d}.npy"


def _claim(
    filesystem: fsspec.AbstractFileSystem,
    folder: str,
    about: SampleAbout,
    shown: str,
    remedy: str,
) -> None:
    """Have ``about.json`` in a folder. Raises ``UserError`` where it is used for something else."""
    try:
        data = read_bytes(filesystem, f"{folder}/{ABOUT_FILE}")
    except FileNotFoundError:
        names = (path.rpartition("/")[2] for path in list_folder(filesystem, folder))
        if any(not name.startswith(TEMPORARY) for name in names):
            raise UserError(
                f"'{shown}' has files and no {ABOUT_FILE}, so that it is not this command's: "
                "name an empty or a new folder"
            ) from None
        text = about.model_dump_json(indent=1) + "\n"
        write_atomic(filesystem, f"{folder}/{ABOUT_FILE}", text.encode())
        return
    try:
        found = json.loads(data)
    except ValueError:
        found = None
    check_same_images(found, about, where=shown, remedy=remedy)


def _remove_folder(output: NpzOutput) -> None:
    """The blocks, ``about.json`` last: without it the rest would be a stranger's."""
    paths = list_folder(output.filesystem, output.parts)
    for path in sorted(paths, key=lambda path: path.endswith(f"/{ABOUT_FILE}")):
        remove(output.filesystem, path)
    if paths and is_local(output.filesystem):
        Path(output.parts).rmdir()
