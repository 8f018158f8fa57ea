"""NATS: the connection, every subject and stream, an ordered consumer, and the one map of errors."""
