"""Other vendors' APIs under /v1, on top of the ordinary submission and streams; their routes are not in our OpenAPI."""
