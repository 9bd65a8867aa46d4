"""What is written down: manifests, specs and run configs as pydantic models. No torch, no ray."""
