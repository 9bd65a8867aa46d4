"""Errors of an extraction whose options differ from those of the existing store."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.cli.config_files import merge
from pipeline.datasets import Listing
from pipeline.extract.compatibility import check_request
from pipeline.store import Store
from schemas.errors import UserError
from schemas.extract import ExtractConfig
from tests.encoded import encode


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"compress": False}, "compression of features zstd, this extraction has none"),
        ({"codec": "small"}, "codec of features rms26, this extraction has rms8"),
        (
            {"teacher": {"mean": (0.5, 0.5, 0.5)}},
            r"teacher\.mean 0\.485,0\.456,0\.406, this extraction has 0\.5,0\.5,0\.5",
        ),
        (
            {"teacher": {"std": (0.5, 0.5, 0.5)}},
            r"teacher\.std 0\.229,0\.224,0\.225, this extraction has 0\.5,0\.5,0\.5",
        ),
        (
            {"teacher": {"resize": "bilinear"}},
            r"teacher\.resize bicubic, this extraction has bilinear",
        ),
        ({"teacher": {"image_size": 64}}, r"teacher\.image_size 32, this extraction has 64"),
    ],
)
def test_the_setting_that_differs_is_named(
    digits_config: ExtractConfig,
    digits_listing: Listing,
    tmp_path_factory: pytest.TempPathFactory,
    options: dict[str, Any],
    reason: str,
) -> None:
    store = encode(tmp_path_factory.mktemp("request"), samples=2, codec="faithful")
    values = {**digits_config.model_dump(), "codec": "faithful", "shard_size": 8, "batch_size": 8}
    config = ExtractConfig.model_validate(merge(values, options))
    listing = Listing(digits_listing.items[:2], digits_listing.num_classes)
    with pytest.raises(UserError, match=f"was made with {reason}: use another --store"):
        check_request(config, listing, Store.open(store.url))
    check_request(ExtractConfig.model_validate(values), listing, Store.open(store.url))
