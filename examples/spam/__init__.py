"""A spam filter taught by active learning: the corpus, simulated annotators, and the demonstration."""
