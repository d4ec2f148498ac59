"""Features of texts: vectors of a frozen encoder, their cache, and TF-IDF."""
