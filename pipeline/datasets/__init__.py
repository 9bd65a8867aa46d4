"""Data sets: listings of (key, label, image) in a fixed, numbered order."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.datasets.captions import list_captioned_folder
from pipeline.datasets.coco import list_coco
from pipeline.datasets.coco_features import list_coco_features
from pipeline.datasets.digits import list_digits, read_digit
from pipeline.datasets.folder import list_class_folders, list_unlabelled
from pipeline.datasets.imagenet import list_imagenet, read_synsets
from pipeline.datasets.listing import ImageItem, Listing, with_names
from pipeline.datasets.listing_check import check_listing
from pipeline.datasets.reader import FileReader, Reader
from pipeline.datasets.repa import list_repa
from pipeline.datasets.tar_shards import CAPTION_SUFFIXES, list_tars
from pipeline.datasets.tar_source import tar_root
from pipeline.storage.files import redact
from schemas.errors import UserError
from schemas.extract import ExtractConfig

COCO = ("coco", "coco256_features")
"""Data sets with the splits of MS-COCO, in the order of image ids."""

__all__ = ["COCO", "ImageItem", "Listing", "list_images", "open_reader"]


def list_images(config: ExtractConfig, class_names: Sequence[str] = ()) -> Listing:
    """All images of ``config.dataset`` in the order of the store. ``class_names`` are those of an
    existing store, whose list holds without --synsets, too. Raises ``UserError``."""
    if config.synsets is not None and config.dataset in ("folder", "demo", *COCO):
        raise UserError(f"--synsets is for ImageNet, not for --dataset {config.dataset}")
    if config.unlabelled and (config.dataset != "folder" or config.captions is not None):
        raise UserError("--unlabelled is for --dataset folder without --captions")
    _check_captions(config)
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
        elif config.dataset == "coco":
            listing = list_coco(source, config.split or "train")
        elif config.dataset == "coco256_features":
            listing = list_coco_features(source, config.split or "train")
        elif config.dataset == "folder" and config.captions is not None:
            listing = list_captioned_folder(source, config.captions)
        elif config.unlabelled:
            listing = list_unlabelled(source)
        elif config.dataset == "folder":
            listing = list_class_folders(source, allow_empty=config.allow_empty_classes)
        else:
            tars = config.dataset == "webdataset"
            listing = list_tars(source, config.captions) if tars else list_repa(source)
            names = read_synsets(config.synsets) if config.synsets else class_names
            listing = with_names(listing, names, redact(source)) if names else listing
        check_listing(listing, redact(_root(config)))
    # COCO's images are in no order that a shuffle has to break, and users know them by position
    return listing if config.dataset in COCO else listing.shuffled(config.order_seed)


def open_reader(config: ExtractConfig) -> Reader:
    """Function that reads the encoded bytes of an item; open it in the process that uses it."""
    return read_digit if config.dataset == "demo" else FileReader(_root(config))


def _check_captions(config: ExtractConfig) -> None:
    """Raises ``UserError`` for options of captions that the data set does not have."""
    if config.split is not None and config.dataset not in COCO:
        raise UserError(f"--split is for MS-COCO, not for --dataset {config.dataset}")
    if config.order_seed and config.dataset in COCO:
        raise UserError("--order-seed is not for MS-COCO, whose order is that of its image ids")
    if config.captions is None or config.dataset == "folder":
        return
    if config.dataset != "webdataset":
        raise UserError(f"--captions is not for --dataset {config.dataset}")
    if config.captions not in CAPTION_SUFFIXES:
        raise UserError(
            f"--captions {config.captions}: with --dataset webdataset captions are in members "
            f"{' or '.join(CAPTION_SUFFIXES)}"
        )


def _root(config: ExtractConfig) -> str:
    """The folder, URL or file below which the paths of the items lie."""
    source = _source(config)
    return tar_root(source) if config.dataset == "webdataset" else source


def _source(config: ExtractConfig) -> str:
    if config.source is None:
        raise UserError("--source is missing: the folder or URL of the images")
    return config.source
