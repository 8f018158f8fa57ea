"""Accepting songs: validation, idempotency, rollback, waiting out short outages."""
