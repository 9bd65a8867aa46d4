"""`python -m pipeline.convert`: re-encode a store without running the extraction again."""

from pipeline.convert.job import Conversion, convert

__all__ = ["Conversion", "convert"]
