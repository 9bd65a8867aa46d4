"""Examination of a Ray cluster from every node, before a run is paid for."""
