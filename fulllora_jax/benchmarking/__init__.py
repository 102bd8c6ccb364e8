"""Races, of schedules and of programs, with their tables and pictures."""
