"""Interpolants between data and noise, and the samplers that go back."""
