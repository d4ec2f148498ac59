"""Simulation of active learning on a labelled corpus, with the functions that the stages use."""
