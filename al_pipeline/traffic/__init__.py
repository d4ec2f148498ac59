"""What a served model was asked and what it answered: the log, and what becomes of it."""
