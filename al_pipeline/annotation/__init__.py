"""Aggregation of annotations into labels."""
