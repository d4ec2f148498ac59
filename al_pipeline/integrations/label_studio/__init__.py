"""Label Studio: the client on its SDK, and a cheap probe without it."""
