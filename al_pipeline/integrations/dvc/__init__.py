"""The DVC client: the only code that imports DVC, in one long-lived process."""
