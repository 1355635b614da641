"""Scripts that reproduce what papers report; no part of the installed package."""
