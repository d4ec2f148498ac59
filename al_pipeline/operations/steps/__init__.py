"""The steps of a tick, grouped by what they work on; `operations/tick.py` runs them."""
