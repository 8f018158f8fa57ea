"""Which hosts a webhook may go to: how they may be written, what they lead to, and which addresses are public."""

import asyncio
import contextlib
import ipaddress
import re
import socket
import threading
from typing import Any

from shared.errors import InvalidRequest

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

LOOK_UPS = 256  # at once; those that nothing waits for any more count until the system gives up, which takes it seconds
_NAME = re.compile(r"(?=.{1,253}\.?$)[a-z0-9_-]{1,63}(?:\.[a-z0-9_-]{1,63})*\.?", re.IGNORECASE)
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*", re.IGNORECASE)

# All that is handed out for use on the internet; what lies beside it means something else, now or one day.
_GLOBAL = ipaddress.ip_network("2000::/3")
# What `is_global` takes for public and is not, in any version of Python: services within one network, relays, ways to
# reach IPv4 addresses of all kinds (6to4, Teredo), documentation.
_NEVER = tuple(
    ipaddress.ip_network(net) for net in ("192.0.0.0/24", "192.88.99.0/24", "2001::/23", "2002::/16", "3fff::/20")
)


def is_public(address: Address) -> bool:
    """Whether an address is one of the open internet, whatever it is wrapped in."""
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return is_public(address.ipv4_mapped)
        if address not in _GLOBAL:
            return False
    return address.is_global and not address.is_multicast and not any(address in net for net in _NEVER)


def check_host(host: str, *, private: bool) -> None:
    """Raise `InvalidRequest` for a host that cannot be called. Names are not looked up: what they lead to may change.

    `host` is ASCII, as a URL has it after IDNA. `private`: whether private addresses may be called.
    """
    with contextlib.suppress(ValueError):
        if is_public(ipaddress.ip_address(host)) or private:
            return
        raise InvalidRequest("webhook_url", "is a private address, which this service does not call")
    if not _NAME.fullmatch(host):
        raise InvalidRequest("webhook_url", "has a host that is neither a name nor an address")
    # 8.8.8.010, 127.1, 0x7f000001: to some these are addresses, and not to all the same ones.
    if _NUMBER.fullmatch(host.removesuffix(".").rpartition(".")[2]):
        raise InvalidRequest("webhook_url", "has an address as its host that is not written as four decimal numbers")


class LookUps:
    """Names looked up in threads of their own: name servers that do not answer hold up nothing else."""

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
            with contextlib.suppress(RuntimeError):  # the gateway is closed, nothing waits
                loop.call_soon_threadsafe(settle, *answer)

        # Not an executor's: the process would wait for them at its end.
        try:
            threading.Thread(target=look, name="look-up", daemon=True).start()
        except RuntimeError as error:  # the system allows no more
            self._free.release()
            raise OSError(str(error)) from None
        return await found


def _address(entry: tuple[Any, ...]) -> Address:
    return ipaddress.ip_address(str(entry[4][0]).partition("%")[0])
