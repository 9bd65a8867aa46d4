"""Alignment losses and the triggers that terminate them."""
