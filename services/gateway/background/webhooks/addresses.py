"""Addresses that users give: how they may be written, which are public, and how names are looked up.

Webhooks go to them, and recordings are fetched from them.
"""

import asyncio
import contextlib
import ipaddress
import re
import socket
import threading
from typing import Any

import httpx

from shared.errors import InvalidRequest

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

LOOK_UPS = 256  # at once; abandoned ones count until the system gives up, which takes it seconds
_NAME = re.compile(r"(?=.{1,253}\.?$)[a-z0-9_-]{1,63}(?:\.[a-z0-9_-]{1,63})*\.?", re.IGNORECASE)
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*", re.IGNORECASE)

# All IPv6 addresses that are assigned for use on the internet.
_GLOBAL = ipaddress.ip_network("2000::/3")
# Not public, though some version of Python's `is_global` says so: services within one network, relays, ways to reach
# IPv4 addresses of all kinds (6to4, Teredo), documentation.
_NEVER = tuple(
    ipaddress.ip_network(net) for net in ("192.0.0.0/24", "192.88.99.0/24", "2001::/23", "2002::/16", "3fff::/20")
)


def is_public(address: Address) -> bool:
    """Whether an address belongs to the public internet. An IPv4 address written as IPv6 is judged as IPv4."""
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return is_public(address.ipv4_mapped)
        if address not in _GLOBAL:
            return False
    return address.is_global and not address.is_multicast and not any(address in net for net in _NEVER)


def parse_url(url: str, *, private: bool, field: str = "webhook_url") -> httpx.URL:
    """Read an address that the request has in `field`. Raises `InvalidRequest` for one that cannot be called.

    `private`: whether private addresses may be called.
    """
    words = "must be an address beginning with https:// or http://"
    try:
        target = httpx.URL(url)
    except (httpx.InvalidURL, ValueError) as error:
        raise InvalidRequest(field, f"{words}: {str(error)[:200]}") from None
    if (
        not target.host
        or target.scheme not in ("http", "https")
        or any(c.isspace() or not c.isprintable() for c in url)
    ):
        raise InvalidRequest(field, words)
    if target.port is not None and not 0 < target.port < 65536:
        raise InvalidRequest(field, f"{words}, with a port from 1 to 65535 if it has one")
    if target.userinfo:
        raise InvalidRequest(field, "must hold no user and password: this service sends none")
    check_host(target.raw_host.decode(), private=private, field=field)
    return target


def check_host(host: str, *, private: bool, field: str = "webhook_url") -> None:
    """Raise `InvalidRequest` for a host that cannot be called. Names are not looked up: their addresses may change.

    `host` is ASCII, as a URL has it after IDNA. `private`: whether private addresses may be called.
    """
    with contextlib.suppress(ValueError):
        if is_public(ipaddress.ip_address(host)) or private:
            return
        raise InvalidRequest(field, "is a private address, which this service does not call")
    if not _NAME.fullmatch(host):
        raise InvalidRequest(field, "has a host that is neither a name nor an address")
    # 8.8.8.010, 127.1, 0x7f000001: some programs take these for addresses, and not all for the same ones.
    if _NUMBER.fullmatch(host.removesuffix(".").rpartition(".")[2]):
        raise InvalidRequest(field, "has an address as its host that is not written as four decimal numbers")


def port_of(url: httpx.URL) -> int:
    """The port that an address leads to."""
    return url.port or (443 if url.scheme == "https" else 80)


def first_allowed(addresses: list[Address], *, private: bool) -> Address | None:
    """The best address that may be called; `private`: whether private ones may. None where all are private."""
    return next((address for address in addresses if private or is_public(address)), None)


class LookUps:
    """Looks up names in threads of their own, so that name servers that do not answer delay nothing else."""

    def __init__(self) -> None:
        self._free = asyncio.Semaphore(LOOK_UPS)

    async def find(self, host: str, port: int) -> list[Address]:
        """The addresses of a host, best first. Raises `OSError` for a name that has none."""
        with contextlib.suppress(ValueError):
            return [ipaddress.ip_address(host)]
        await self._free.acquire()
        loop = asyncio.get_running_loop()
        found: asyncio.Future[list[Address]] = loop.create_future()

        def settle(addresses: list[Address], error: Exception | None) -> None:
            self._free.release()
            if found.cancelled():
                return
            if error is None:
                found.set_result(addresses)
            else:
                found.set_exception(error)

        def look() -> None:
            answer: tuple[list[Address], Exception | None]
            try:
                answer = [_address(entry) for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)], None
            except Exception as error:
                answer = [], error
            with contextlib.suppress(RuntimeError):  # the gateway is closed, and nothing waits
                loop.call_soon_threadsafe(settle, *answer)

        # Not an executor's threads: the process would wait for them at its end.
        try:
            threading.Thread(target=look, name="look-up", daemon=True).start()
        except RuntimeError as error:  # the system allows no more
            self._free.release()
            raise OSError(str(error)) from None
        return await found


def _address(entry: tuple[Any, ...]) -> Address:
    return ipaddress.ip_address(str(entry[4][0]).partition("%")[0])
