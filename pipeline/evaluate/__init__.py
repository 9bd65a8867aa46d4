"""Metrics of generated images against real ones: Fréchet distances, Inception score, precision and
recall."""
