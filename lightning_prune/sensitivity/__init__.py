"""Measures what a model loses when one layer alone is pruned, without retraining."""
