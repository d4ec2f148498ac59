"""Turn files into items and labels: rows, corrections, the test set, staging. `operations/ingest.py` runs it."""
