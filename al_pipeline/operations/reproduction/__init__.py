"""Reproduction of a published round: the clone, the comparison, the result. `operations/reproduce.py` runs it."""
