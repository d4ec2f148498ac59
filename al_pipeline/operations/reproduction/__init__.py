"""How a published round is made again: the clone, the comparison, the result. `operations/reproduce.py` runs it."""
