"""Worked examples; each is a complete project."""
