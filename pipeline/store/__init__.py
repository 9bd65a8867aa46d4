"""The store: shards of joined streams with a manifest, commit records and verified reads."""

from pipeline.store.loader import Batch, BatchLoader
from pipeline.store.order import SampleOrder
from pipeline.store.reader import StreamReader
from pipeline.store.store import Store
from pipeline.store.writer import ShardWriter

__all__ = ["Batch", "BatchLoader", "SampleOrder", "ShardWriter", "Store", "StreamReader"]
