"""Frozen vision transformers whose features and attention are the targets of the alignment."""

from pipeline.teachers.teacher import Teacher, TeacherTargets

__all__ = ["Teacher", "TeacherTargets"]
