"""Delivering a webhook: one signed POST to an address that may be called."""

import asyncio
import base64
import time

import httpx

from services.gateway.background.webhooks.addresses import parse_url
from services.gateway.background.webhooks.checked_client import CheckedClient, PrivateAddress
from services.gateway.background.webhooks.payload import Call, sign
from shared.errors import InvalidRequest
from shared.settings import Settings

TIMEOUT = 15.0  # seconds for a delivery


class DeliveryFailed(Exception):
    """A webhook was not delivered. `final`: it never will be; else trying again after `pause` seconds may help."""

    def __init__(self, reason: str, *, pause: float = 0.0, final: bool = False) -> None:
        super().__init__(reason)
        self.pause, self.final = pause, final


class Sender:
    """Sends the webhooks of one gateway."""

    def __init__(self, settings: Settings) -> None:
        self._secret = base64.b64decode(settings.webhook_secret.removeprefix("whsec_"))
        self._private = settings.webhook_private
        self._http = CheckedClient(TIMEOUT, private=self._private)

    @property
    def enabled(self) -> bool:
        """Whether there is a secret to sign with. Without one no webhook is accepted or sent."""
        return bool(self._secret)

    async def close(self) -> None:
        """Close the HTTP client."""
        await self._http.close()

    def target(self, url: str) -> httpx.URL:
        """Read an address. Raises `InvalidRequest` for one that cannot be called. Names are not looked up here."""
        if not self.enabled:
            raise InvalidRequest("webhook_url", "cannot be used: HEARTMULA_WEBHOOK_SECRET is not set on this service")
        return parse_url(url, private=self._private)

    async def send(self, call: Call, target: httpx.URL) -> None:
        """Deliver a webhook. Raises `DeliveryFailed`, httpx's errors or `OSError`."""
        now = int(time.time())
        headers = {
            "Content-Type": "application/json",
            "webhook-id": call.id,
            "webhook-timestamp": str(now),
            "webhook-signature": sign(self._secret, call.id, now, call.body),
        }
        try:
            async with asyncio.timeout(TIMEOUT):
                answer = await self._http.send("POST", target, headers, call.body)
                await answer.aclose()  # its body does not matter
        except PrivateAddress:
            raise DeliveryFailed("its address is a private one", final=True) from None
        if answer.is_success:
            return
        pause = answer.headers.get("retry-after", "")
        raise DeliveryFailed(
            f"it answered {answer.status_code}",
            pause=float(pause) if pause.isascii() and pause.isdigit() and len(pause) < 7 else 0.0,
            final=answer.status_code == 410,
        )
