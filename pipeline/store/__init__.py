"""The store: shards of several streams, with a manifest, commit records and verified reads."""

from pipeline.store.reading.batch_loader import Batch, BatchLoader
from pipeline.store.reading.sample_order import SampleOrder
from pipeline.store.reading.stream_reader import StreamReader
from pipeline.store.store import Store
from pipeline.store.writer import ShardWriter

__all__ = ["Batch", "BatchLoader", "SampleOrder", "ShardWriter", "Store", "StreamReader"]
