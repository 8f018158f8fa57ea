"""Everything that users and other programs see of the system, each as one JSON document made from the present code."""

from typing import Any

from tests.compatibility.compare import plain
from tests.compatibility.configuration import nats, settings
from tests.compatibility.gateway import asyncapi, metrics, openapi, problems, routes
from tests.compatibility.programs import commands, python_client

DOCUMENTS = {
    "openapi": openapi,
    "asyncapi": asyncapi,
    "routes": routes,
    "problems": problems,
    "settings": settings,
    "nats": nats,
    "commands": commands,
    "client": python_client,
    "metrics": metrics,
}


async def document(name: str) -> Any:
    """One document as JSON holds it."""
    return plain(await DOCUMENTS[name]())
