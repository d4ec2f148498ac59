"""Worked examples: each is a whole project."""
