"""How long the client waits and how often it tries again."""

RETRY_WAITS = (0.3, 0.6, 1.2)  # seconds before each further attempt
TEMPORARY = (502, 503, 504)  # statuses of a failure that may pass
MAX_RETRY_WAIT = 30.0  # seconds, whatever Retry-After says
AWAY = 60.0  # seconds for which a service that has answered may be unreachable while a song is followed
INTERVAL = 1.0  # seconds between attempts to follow it again


def wait_for(seconds: float, retry_after: float | None) -> float:
    """Return how long to wait, in seconds: longer than `seconds` where the service asks for it."""
    return min(max(seconds, retry_after or 0), MAX_RETRY_WAIT)
