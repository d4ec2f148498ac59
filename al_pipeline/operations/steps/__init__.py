"""The steps of a tick, by what they work on; `operations/tick.py` takes them."""
