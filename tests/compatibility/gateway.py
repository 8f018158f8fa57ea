"""What the gateway shows: documents of its interfaces, routes, errors and figures.

Nothing here needs a server: a gateway that is not connected knows all of it.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import msgspec
from litestar import Litestar
from litestar.routes import HTTPRoute
from prometheus_client import CollectorRegistry
from prometheus_client.metrics import MetricWrapperBase

from services.gateway.api.docs.asyncapi import document as asyncapi_document
from services.gateway.api.docs.openapi import complete, marks_of
from services.gateway.api.nats_bodies import ERROR_CODES
from services.gateway.api.websocket import DONE, FAULT, RECONNECT, UNAUTHORIZED, UNKNOWN
from services.gateway.api.websocket import REFUSED as WRONG_AFTER
from services.gateway.app import create_app
from services.gateway.auth.authenticate import COOKIE, COOKIE_SECONDS
from services.gateway.compatible.served_model import ServedModel
from services.gateway.container import Container
from services.gateway.errors import MEDIA_TYPE, PROBLEMS, to_api_error
from services.gateway.monitoring.health import QueueDepth, Server, Snapshot
from shared.errors import InvalidRequest, JobConflict, NewerRecord, NoRoom, QueueFull, Unavailable
from shared.model.prompt import Prompter
from shared.nats.connection import Connection
from shared.settings import Settings
from shared.storage.objects import ObjectStore
from shared.worker.metrics import Families, WorkerMetrics
from tests.compatibility.compare import without_prose
from tests.compatibility.stored import WORKING

_SERVERS = Settings(
    nats_url="nats://127.0.0.1:1",
    s3_endpoint="http://127.0.0.1:1",
    s3_access_key="access",
    s3_secret_key="secret",
    cors_origins="https://songs.example",
    data_dir=Path("nowhere"),
)


async def _gateway() -> Container:
    """A gateway that is connected to nothing. Has to be made in an event loop."""
    return Container(
        _SERVERS,
        Connection(_SERVERS, None),
        ObjectStore(_SERVERS),
        cast("Prompter", None),
        ServedModel("HeartMuLa-oss-3B", 0),
        can_encode=True,
    )


async def _application() -> Litestar:
    return create_app(await _gateway())


async def openapi() -> Any:
    """The OpenAPI document."""
    app = await _application()
    made = msgspec.json.decode(msgspec.json.encode(app.openapi_schema.to_schema()))
    return without_prose(complete(made, marks_of(app)))


async def asyncapi() -> Any:
    """The AsyncAPI document."""
    return without_prose(msgspec.json.decode(asyncapi_document()))


async def routes() -> Any:
    """Every route, those of pages and documents too, with the status that its handler answers with."""
    app = await _application()
    found: dict[str, Any] = {}
    for route in app.routes:
        methods = found.setdefault(route.path_format, {})
        if isinstance(route, HTTPRoute):
            for handler in route.route_handlers:
                methods |= dict.fromkeys(handler.http_methods, handler.status_code)
        else:
            methods["websocket"] = None
    cors = app.cors_config
    assert cors is not None
    return {
        "routes": {path: dict(sorted(methods.items())) for path, methods in sorted(found.items())},
        "websocket closes": {
            "the song has ended": DONE,
            "after is no id": WRONG_AFTER,
            "fault of the gateway": FAULT,
            "connect again": RECONNECT,
            "no valid key": UNAUTHORIZED,
            "unknown song": UNKNOWN,
        },
        "session cookie": [COOKIE, COOKIE_SECONDS],
        "largest body": app.request_max_body_size,
        "cors": [cors.allow_methods, cors.allow_headers, cors.expose_headers],
    }


async def problems() -> Any:
    """Every problem type with status and title, what NATS clients get for it, and which error becomes which."""
    errors = {
        "a field is wrong": InvalidRequest("tags", ""),
        "the queue is full": QueueFull(),
        "NATS is away": Unavailable("nats", ""),
        "the store has no room": NoRoom("s3", ""),
        "the record changed": JobConflict(),
        "the record is newer": NewerRecord(),
    }
    answers = {name: to_api_error(error, 7) for name, error in errors.items()}
    return {
        "media type": MEDIA_TYPE,
        "types": {kind: list(found) for kind, found in PROBLEMS.items()},
        "error codes of NATS clients": ERROR_CODES,
        "errors": {
            name: [{member: value for member, value in answer.body().items() if member != "detail"}, answer.headers]
            for name, answer in answers.items()
        },
    }


async def metrics() -> Any:
    """Every figure of gateway and worker: its type, its labels, and the values of labels that are known beforehand."""
    gateway = (await _gateway()).metrics
    gateway.text(_snapshot(), "")
    worker = Families()
    WorkerMetrics("codec", worker)
    return {"gateway": _families(gateway._registry), "worker": _families(worker.registry)}


def _snapshot() -> Snapshot:
    return Snapshot(
        taken=0,
        nats=Server(ok=True),
        object_store=Server(ok=True),
        workers=[WORKING],
        queue=QueueDepth(tokens=1, decode=1, encode=1, intake=1),
        ages={"tokens": 1.0},
        decode_full=False,
    )


def _families(registry: CollectorRegistry) -> Any:
    labels = {
        found._name: list(found._labelnames)
        for found in registry._collector_to_names
        if isinstance(found, MetricWrapperBase)
    }
    return {
        family.name: {
            "type": family.type,
            "labels": labels.get(family.name),
            "samples": _samples((sample.name, sample.labels) for sample in family.samples),
        }
        for family in sorted(registry.collect(), key=lambda family: family.name)
    }


def _samples(samples: Iterable[tuple[str, dict[str, str]]]) -> list[str]:
    return [
        " ".join([name, *(f"{label}={value}" for label, value in sorted(labels.items()))])
        for name, labels in samples
        if not name.endswith("_created")
    ]
