"""Looks for ways to lose a run: kills it, runs it under all that a Trainer offers, feeds it nonsense, cuts for long."""
