"""Answers of people -> labels."""
