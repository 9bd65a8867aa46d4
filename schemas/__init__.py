"""Pydantic models of what is written to disk: manifests, options, run configs. No torch, no ray."""

from schemas.installation import report_missing_packages

report_missing_packages()
