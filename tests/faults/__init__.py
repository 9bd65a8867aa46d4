"""The harness that breaks things: `python -m tests.faults`."""
