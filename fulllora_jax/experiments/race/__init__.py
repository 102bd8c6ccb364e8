"""Races schedules of the inner attack to a robust accuracy."""
