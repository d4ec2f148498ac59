"""How files become items and labels: rows, corrections, the test set, staging. `operations/ingest.py` runs it."""
