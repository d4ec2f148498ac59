"""Do new texts differ from the pool? Arrays in, figures out: a domain classifier, classes, words, the accuracy."""
