"""The durable store behind retrieval patches: facts with their keys, every version of them, in one folder."""
