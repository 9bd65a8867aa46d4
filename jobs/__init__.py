"""Entry points of the pipeline's commands and Ray jobs."""
