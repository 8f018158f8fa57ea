"""Token engines: the interface and its implementations."""
