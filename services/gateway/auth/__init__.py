"""Access control: tenants and their keys, origins of pages, and quotas."""
