"""Every structure that crosses a process boundary, with a schema version, and how each is read."""
