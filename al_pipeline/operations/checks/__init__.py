"""The checks of `al doctor`, by subject; `operations/doctor.py` runs them in order."""
