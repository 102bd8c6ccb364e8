"""Data sets that come with the project, as tfds builders."""
