"""Several processes at work: Ray clusters and actors, process groups, signals."""
