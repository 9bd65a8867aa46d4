"""Checkpoints of a run: format, integrity, selection, transport, export and import."""
