"""Nonsense of several kinds, and what must hold when it is fed; counts nothing."""
