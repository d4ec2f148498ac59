"""Clients of external systems, one module or package each: git, DVC, Label Studio, child processes."""
