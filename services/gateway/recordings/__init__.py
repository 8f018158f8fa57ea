"""Recordings: receiving what users upload, showing it, removing it."""
