"""Origins: whether the headers ``Host`` and ``Origin`` name this service.

A browser sends both, and no page can change them. `Origin` says from where the page comes that sends a request; `Host`
says under which name the browser reached the service, and so exposes a name that an attacker has bound to this machine
(DNS rebinding).
"""

import ipaddress
import re
from dataclasses import dataclass

_PORTS = {"http": 80, "https": 443}
_ADDRESS = re.compile(r"(\[[0-9a-f:.]+(?:%[0-9a-z._~-]+)?\]|[^:/?#@\[\]\s,]+)(?::([0-9]{1,5}))?")


@dataclass(frozen=True)
class Address:
    """A host, in lower case and without a dot at its end, and its port where one is named."""

    host: str
    port: int | None

    @classmethod
    def parse(cls, text: str) -> "Address | None":
        """Read a `Host` header, or what follows the scheme of an origin. None where it is malformed."""
        found = _ADDRESS.fullmatch(text.lower())
        return cls(found[1].removesuffix("."), int(found[2]) if found[2] else None) if found else None

    @property
    def cannot_be_rebound(self) -> bool:
        """Whether the host cannot be bound to another machine: a name of the loopback, or an IP address.

        Browsers resolve ``localhost`` and every name below it to the loopback themselves, and look no address up.
        """
        if self.host == "localhost" or self.host.endswith(".localhost"):
            return True
        try:
            ipaddress.ip_address(self.host.strip("[]"))
        except ValueError:
            return False
        return True


@dataclass(frozen=True)
class Origin:
    """The origin of a page. The port is that of the scheme where none is named."""

    scheme: str
    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> "Origin | None":
        """Read an `Origin` header. None for ``null`` and everything else that is not the origin of a web page."""
        scheme, _, rest = text.strip().lower().partition("://")
        address = Address.parse(rest)
        if address is None or scheme not in _PORTS:
            return None
        return cls(scheme, address.host, _PORTS[scheme] if address.port is None else address.port)

    def is_at(self, host: str) -> bool:
        """Whether a `Host` header names this origin.

        The scheme is not compared: behind a proxy with TLS the browser's is https, and this service's http.
        """
        address = Address.parse(host)
        if address is None:
            return False
        port = _PORTS[self.scheme] if address.port is None else address.port
        return (address.host, port) == (self.host, self.port)


def is_own(origin: str, host: str) -> bool:
    """Whether an `Origin` header and a `Host` header name the same service."""
    found = Origin.parse(origin)
    return found is not None and found.is_at(host)
