"""The same train step in PyTorch, in a process of its own."""
