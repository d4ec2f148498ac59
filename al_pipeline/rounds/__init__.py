"""The round as pure functions: the next step from the facts, what a person decided, a round's record."""
