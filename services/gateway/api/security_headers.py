"""Headers that every answer carries, whoever makes it."""

from litestar.types import Message, Scope

_ALWAYS = {
    b"x-content-type-options": b"nosniff",
    b"referrer-policy": b"same-origin",
    b"cross-origin-resource-policy": b"same-origin",
    # For what is no page; pages bring their own. The browser's own player for an address of audio needs media.
    b"content-security-policy": b"default-src 'none'; media-src 'self'; frame-ancestors 'none'",
}


async def secure(message: Message, scope: Scope) -> None:
    """Litestar's `before_send` hook: adds the headers that an answer lacks."""
    if message["type"] == "http.response.start":
        headers = list(message["headers"])
        present = {name.lower() for name, _ in headers}
        message["headers"] = headers + [item for item in _ALWAYS.items() if item[0] not in present]
