"""Background work: the reconciler, songs that wait for their time, and webhooks."""
