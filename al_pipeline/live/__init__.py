"""Train as you annotate: the live model, what it asks next, and the append-only plan of what it asked."""
