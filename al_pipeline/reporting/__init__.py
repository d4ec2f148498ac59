"""Reports and charts rendered from records."""
