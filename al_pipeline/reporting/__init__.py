"""Records -> pages and pictures."""
