"""Work beside requests: the reconciler and webhooks."""
