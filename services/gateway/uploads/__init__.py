"""Bodies of requests that are files: written to the data folder while they arrive, within limits."""
