"""Data sets: listings of (key, label, image) in a fixed, numbered order."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.datasets.digits import list_digits, read_digit
from pipeline.datasets.folder import list_class_folders
from pipeline.datasets.imagenet import list_imagenet, read_synsets
from pipeline.datasets.listing import ImageItem, Listing, with_names
from pipeline.datasets.listing_check import check_listing
from pipeline.datasets.reader import FileReader, Reader
from pipeline.datasets.repa import list_repa
from pipeline.datasets.tar_shards import list_tars
from pipeline.datasets.tar_source import tar_root
from pipeline.storage.files import redact
from schemas.errors import UserError
from schemas.extract import ExtractConfig

__all__ = ["ImageItem", "Listing", "list_images", "open_reader"]


def list_images(config: ExtractConfig, class_names: Sequence[str] = ()) -> Listing:
    """All images of ``config.dataset`` in the order of the store. ``class_names`` are those of an
    existing store, whose list holds without --synsets, too. Raises ``UserError``."""
    if config.synsets is not None and config.dataset in ("folder", "demo"):
        raise UserError(f"--synsets is for ImageNet, not for --dataset {config.dataset}")
    if config.dataset == "demo":
        listing = list_digits()
    else:
        source = _source(config)
        if config.dataset == "imagenet":
            listing = list_imagenet(
                source,
                config.synsets,
                class_names=class_names,
                allow_empty=config.allow_empty_classes,
            )
        elif config.dataset == "folder":
            listing = list_class_folders(source, allow_empty=config.allow_empty_classes)
        else:
            listing = list_repa(source) if config.dataset == "repa" else list_tars(source)
            names = read_synsets(config.synsets) if config.synsets else class_names
            listing = with_names(listing, names, redact(source)) if names else listing
        check_listing(listing, redact(_root(config)))
    return listing.shuffled(config.order_seed)


def open_reader(config: ExtractConfig) -> Reader:
    """Function that reads the encoded bytes of an item; open it in the process that uses it."""
    return read_digit if config.dataset == "demo" else FileReader(_root(config))


def _root(config: ExtractConfig) -> str:
    """The folder, URL or file below which the paths of the items lie."""
    source = _source(config)
    return tar_root(source) if config.dataset == "webdataset" else source


def _source(config: ExtractConfig) -> str:
    if config.source is None:
        raise UserError("--source is missing: the folder or URL of the images")
    return config.source
