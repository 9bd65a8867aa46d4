"""Entry points of the pipeline's commands and Ray jobs."""

from schemas.installation import report_missing_packages

report_missing_packages()
