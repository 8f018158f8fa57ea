"""An HTTP client for addresses that users give: it connects to an address that was checked, not to a name."""

from collections.abc import Mapping

import httpx

from services.gateway.background.webhooks.addresses import LookUps, first_allowed, port_of


class PrivateAddress(Exception):
    """A name leads to no address that may be called."""


class CheckedClient:
    """Sends requests to public addresses, and to private ones where that is allowed."""

    def __init__(self, timeout: httpx.Timeout | float, *, private: bool) -> None:
        self._private, self._look_ups = private, LookUps()
        # No proxy: it would resolve the name again, and reach hosts that must not be reached. No connection is used
        # again: they are kept by address, and the certificate that one name has shown there says nothing about another.
        unshared = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        self._http = httpx.AsyncClient(timeout=timeout, trust_env=False, follow_redirects=False, limits=unshared)

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def send(
        self, method: str, target: httpx.URL, headers: Mapping[str, str], content: bytes | None = None
    ) -> httpx.Response:
        """Send a request; returns the answer, whose body is not read yet.

        Raises `PrivateAddress`, httpx's errors or `OSError`.
        """
        name, port = target.raw_host.decode(), port_of(target)
        address = first_allowed(await self._look_ups.find(name, port), private=self._private)
        if address is None:
            raise PrivateAddress
        request = self._http.build_request(
            method,
            # The name could lead to another address by now.
            target.copy_with(host=str(address), port=port, fragment=None),
            content=content,
            headers={"Host": target.netloc.decode(), "User-Agent": "HeartMuLa-on-JetStream", **headers},
            extensions={"sni_hostname": name},
        )
        return await self._http.send(request, stream=True)
