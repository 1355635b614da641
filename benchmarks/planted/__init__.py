"""Errors planted in right cuts: in which networks, which errors, and whether they have an effect."""
