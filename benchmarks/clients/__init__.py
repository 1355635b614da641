"""Trains models of other libraries through their own API with our callbacks; ``__main__`` is the command."""
