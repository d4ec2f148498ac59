"""A spam filter trained by active learning: the corpus, simulated annotators, and the demo."""
