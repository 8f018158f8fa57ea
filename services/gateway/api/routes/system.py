"""Routes of the service itself: its health, its devices, probes, metrics, and the web page."""

from typing import Any

from litestar import Request, Response, get, route
from litestar.di import NamedDependency
from litestar.openapi.datastructures import ResponseSpec
from litestar.params import FromPath

from services.gateway.api.docs.openapi import TEXT, Answer, operation, problems
from services.gateway.api.guards import PROBE, PUBLIC
from services.gateway.api.responses import GET_AND_HEAD, NO_STORE
from services.gateway.api.static_files import StaticFiles
from services.gateway.auth.api_keys import Caller
from services.gateway.auth.authenticate import Authenticator
from services.gateway.monitoring.devices import Devices, GpusBody
from services.gateway.monitoring.health import Health, HealthBody
from services.gateway.monitoring.metrics import Metrics
from services.gateway.songs.index import SongIndex
from shared.nats.connection import Connection

AnyRequest = Request[Any, Any, Any]


@get(
    "/health",
    opt=PROBE,
    operation_class=operation(answers={503: Answer("a song could not be taken now")}),
    responses={503: ResponseSpec(HealthBody, generate_examples=False)},
)
async def health(health: NamedDependency[Health]) -> Response[HealthBody]:
    """Whether a song could be taken and made; 503 when it could not even be taken."""
    body = (await health.snapshot()).body
    return Response(body, status_code=503 if body.status == "unavailable" else 200, headers=NO_STORE)


@get("/api/gpu", responses=problems(503))
async def gpus(
    devices: NamedDependency[Devices],
    authenticator: NamedDependency[Authenticator],
    song_index: NamedDependency[SongIndex],
    caller: NamedDependency[Caller],
) -> Response[GpusBody]:
    """Every device, the worker that holds it and those that wait for it."""

    def is_visible(job_id: str) -> bool:
        return not authenticator.keys_required or song_index.belongs(job_id, caller.tenant)

    return Response(await devices.body(is_visible), headers=NO_STORE)


@get("/livez", opt=PROBE)
async def livez() -> dict[str, bool]:
    """This process answers."""
    return {"ok": True}


@get(
    "/readyz",
    opt=PROBE,
    responses={503: ResponseSpec(dict[str, bool], generate_examples=False, description="not yet")},
)
async def readyz(nats: NamedDependency[Connection]) -> Response[dict[str, bool]]:
    """NATS is connected and set up."""
    return Response({"ok": nats.is_connected}, status_code=200 if nats.is_connected else 503, headers=NO_STORE)


@get(
    "/metrics",
    opt=PROBE,
    operation_class=operation(
        answers={
            200: Answer("the figures", content=dict.fromkeys(("text/plain", "application/openmetrics-text"), TEXT))
        }
    ),
)
async def metrics(
    request: AnyRequest, metrics: NamedDependency[Metrics], health: NamedDependency[Health]
) -> Response[bytes]:
    """Figures for Prometheus."""
    text, media_type = metrics.text(await health.snapshot(), request.headers.get("accept", ""))
    if media_type.startswith("text/"):  # Litestar adds it
        media_type = media_type.removesuffix("; charset=utf-8")
    return Response(text, media_type=media_type, headers=NO_STORE)


@route("/", http_method=GET_AND_HEAD, opt=PUBLIC, include_in_schema=False)
async def index(request: AnyRequest, static_files: NamedDependency[StaticFiles]) -> Response[bytes]:
    """The web page."""
    return static_files.response(request, "index.html")


@route("/static/{name:path}", http_method=GET_AND_HEAD, opt=PUBLIC, include_in_schema=False)
async def static(
    request: AnyRequest, static_files: NamedDependency[StaticFiles], name: FromPath[str]
) -> Response[bytes]:
    """The files that the web page consists of."""
    return static_files.response(request, name.lstrip("/"))


ROUTES = (health, gpus, index, static, livez, readyz, metrics)
