"""Prunes models in plain PyTorch, each way in a file of its own: choose, prove, and only then write."""
