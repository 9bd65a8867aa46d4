"""Benchmarks: ``python -m tests.bench NAME``. They print tables and assert nothing about time."""
