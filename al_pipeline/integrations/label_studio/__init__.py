"""All that knows the HTTP API of Label Studio: its client, the form of what is sent and received, a cheap probe."""
