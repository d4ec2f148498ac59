"""Which items to ask about: arrays in, choices out. Knows no model, no file, no network."""
