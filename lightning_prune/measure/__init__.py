"""Measures models and runs: FLOPs, latency, gradients, activations, Gram matrices; hooks live in ``with``."""
