"""Writes pruned models so that files, or hardware, gain by their zeros."""
