"""How a model is called, walked and left as it was found; knows nothing of pruning."""
