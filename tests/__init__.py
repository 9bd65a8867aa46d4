"""Beside what they test. A package, lest one of that name among those installed come first."""
