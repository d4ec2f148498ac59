"""The published models over HTTP, `al serve`."""
