"""Pydantic models of what is written to disk: manifests, options, run configs. No torch, no ray."""
