"""Pulling the student towards the teacher, and when to stop."""
