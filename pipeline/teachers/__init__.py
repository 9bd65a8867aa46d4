"""Frozen vision transformers whose tokens and attention the student is pulled towards."""

from pipeline.teachers.teacher import Teacher, TeacherTargets

__all__ = ["Teacher", "TeacherTargets"]
