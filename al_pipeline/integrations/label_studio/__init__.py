"""Everything that uses Label Studio's HTTP API: the client, the format of requests and replies, a cheap probe."""
