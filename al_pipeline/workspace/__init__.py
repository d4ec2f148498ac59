"""A workspace on this machine: the paths of its files, its identity, its lock, and which of its files are trusted."""
