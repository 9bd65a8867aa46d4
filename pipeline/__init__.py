"""HASTE as a pipeline: run the teacher once, stream what it saw, train, let it go."""

from schemas.installation import report_missing_packages

report_missing_packages()
