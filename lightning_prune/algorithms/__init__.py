"""The algorithms of pruning: tensors in, tensors out; no model is known here."""
