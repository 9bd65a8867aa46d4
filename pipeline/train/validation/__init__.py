"""Samples and distances that a run measures while it trains."""
