"""Code that all services share: settings, messages, NATS, job records, the device's lease, object storage."""
