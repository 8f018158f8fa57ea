"""What the services agree on: settings, messages, topology, job records, the GPU lease, object storage."""
