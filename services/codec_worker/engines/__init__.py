"""Codec engines: the interface and its implementations."""
