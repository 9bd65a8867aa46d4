"""Reading a store: sample order, batches ahead of time, caches, quarantine."""
