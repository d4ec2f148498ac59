"""What a text is to a model: vectors of a frozen encoder, TF-IDF, and the cache of what was computed."""
