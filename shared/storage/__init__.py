"""The object store: objects and their keys, token files, temporary folders."""
