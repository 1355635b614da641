"""Looks for ways to lose a run: kills it, runs it under everything a Trainer offers, feeds it nonsense, cuts for long."""
