"""`python -m pipeline.store convert`: a store in another form, without the teacher's extraction."""

from pipeline.convert.job import Conversion, convert

__all__ = ["Conversion", "convert"]
