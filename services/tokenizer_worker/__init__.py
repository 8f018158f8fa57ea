"""Lyrics and tags to audio tokens, on the device, while the lease allows it."""
