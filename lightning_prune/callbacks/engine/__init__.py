"""The engine of a run that prunes: when, what is logged, what a checkpoint remembers."""
