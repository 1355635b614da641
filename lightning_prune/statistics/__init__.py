"""Reads what runs show: gradients, activations, Gram matrices, derivatives of outputs; hooks live in ``with``."""
