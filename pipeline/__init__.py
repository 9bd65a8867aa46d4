"""HASTE as a pipeline: run the teacher once, stream what it saw, train, let it go."""
