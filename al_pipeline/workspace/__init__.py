"""A user's project on this machine: where its files lie, its identity, its lock, what of it is trusted."""
