"""The checks of `al doctor`, by what they look at; `operations/doctor.py` runs them in order."""
