"""Simulates active learning on a corpus whose labels are known, with the functions that the stages use."""
