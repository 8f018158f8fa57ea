"""The embedded NATS and S3 servers."""
