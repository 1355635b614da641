"""Pruning algorithms on tensors: criteria, selection, schedules and second-order solvers."""
