"""Aggregates annotations into labels."""
