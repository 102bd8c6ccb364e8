"""What the benchmark command measures, and against what."""
