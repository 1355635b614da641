"""Prunes models in plain PyTorch, each way in a file of its own: choose, verify, and only then write."""
