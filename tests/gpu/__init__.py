"""Rehearsal of the GPU's code without a GPU, and checks for a machine that has one."""
