"""The address of the service and the key for it, as they are given to a client."""

import ipaddress
from urllib.parse import urlsplit


def authorization(key: str | None) -> dict[str, str]:
    """Return the headers that carry an API key. Raises `ValueError` for what no header can carry."""
    if key is not None and not (key.isascii() and key.isprintable() and key and " " not in key):
        raise ValueError("the API key must be visible ASCII characters")
    return {"Authorization": f"Bearer {key}"} if key else {}


def host_of(url: str) -> str:
    """Return the host of the service's address. Raises `ValueError` for an address that is none."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"{url!r} is no http:// or https:// address")
    return parts.hostname


def is_loopback(host: str) -> bool:
    """Whether a host is this machine itself."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
