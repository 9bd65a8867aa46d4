"""Noise processes, denoising objectives and samplers."""
