"""Security headers that every response carries."""

from litestar.types import Message, Scope

_ALWAYS = {
    b"x-content-type-options": b"nosniff",
    b"referrer-policy": b"same-origin",
    b"cross-origin-resource-policy": b"same-origin",
    # For everything but pages, which set their own. A browser that opens the address of audio needs media-src.
    b"content-security-policy": b"default-src 'none'; media-src 'self'; frame-ancestors 'none'",
}


async def secure(message: Message, scope: Scope) -> None:
    """Add the headers that a response lacks: Litestar's `before_send` hook."""
    if message["type"] == "http.response.start":
        headers = list(message["headers"])
        present = {name.lower() for name, _ in headers}
        message["headers"] = headers + [item for item in _ALWAYS.items() if item[0] not in present]
