"""Trained adapters at work: inference, many adapters, export, PyTorch."""
