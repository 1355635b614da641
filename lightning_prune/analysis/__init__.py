"""Answers questions about a model before it is pruned: sensitivity, agreement of criteria, latency when slim."""
