"""HASTE as a pipeline: run the teacher once, store its outputs, train on them without it."""

from schemas.installation import report_missing_packages

report_missing_packages()
