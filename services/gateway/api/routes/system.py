"""The service itself: health, devices, probes, figures, and the web page."""

from typing import Any

from litestar import Request, Response, get, route
from litestar.datastructures import State
from litestar.di import NamedDependency
from litestar.enums import HttpMethod
from litestar.openapi.datastructures import ResponseSpec
from litestar.params import FromPath

from services.gateway.api.docs.openapi import (
    TEXT,
    Answer,
    operation,
    refusals,
)
from services.gateway.api.guards import PROBE, PUBLIC
from services.gateway.api.static_files import Pages
from services.gateway.auth.api_keys import Caller
from services.gateway.container import Gateway
from services.gateway.monitoring import devices as gpu
from services.gateway.monitoring.health import HealthBody

NO_STORE = {"Cache-Control": "no-store"}
GET_AND_HEAD = [HttpMethod.GET, HttpMethod.HEAD]
AnyRequest = Request[Any, Any, State]


@get(
    "/health",
    opt=PROBE,
    operation_class=operation(answers={503: Answer("a song could not be taken now")}),
    responses={503: ResponseSpec(HealthBody, generate_examples=False)},
)
async def health(gateway: NamedDependency[Gateway]) -> Response[HealthBody]:
    """Whether a song could be taken and made; 503 when it could not even be taken."""
    body = (await gateway.health.snapshot()).body
    return Response(body, status_code=503 if body.status == "unavailable" else 200, headers=NO_STORE)


@get("/api/gpu", responses=refusals(503))
async def gpus(gateway: NamedDependency[Gateway], caller: NamedDependency[Caller]) -> Response[gpu.GpusBody]:
    """Every device, who holds it and who waits for it."""
    return Response(await gpu.gpus(gateway, caller.tenant), headers=NO_STORE)


@route("/", http_method=GET_AND_HEAD, opt=PUBLIC, include_in_schema=False)
async def index(request: AnyRequest, pages: NamedDependency[Pages]) -> Response[bytes]:
    """The web page."""
    return pages.answer(request, "index.html")


@route("/static/{name:path}", http_method=GET_AND_HEAD, opt=PUBLIC, include_in_schema=False)
async def static(request: AnyRequest, pages: NamedDependency[Pages], name: FromPath[str]) -> Response[bytes]:
    """What the web page is made of."""
    return pages.answer(request, name.lstrip("/"))


@get("/livez", opt=PROBE)
async def livez() -> dict[str, bool]:
    """This process answers."""
    return {"ok": True}


@get(
    "/readyz",
    opt=PROBE,
    responses={503: ResponseSpec(dict[str, bool], generate_examples=False, description="not yet")},
)
async def readyz(gateway: NamedDependency[Gateway]) -> Response[dict[str, bool]]:
    """NATS is connected and set up."""
    return Response({"ok": gateway.ready}, status_code=200 if gateway.ready else 503, headers=NO_STORE)


@get(
    "/metrics",
    opt=PROBE,
    operation_class=operation(
        answers={
            200: Answer("the figures", content=dict.fromkeys(("text/plain", "application/openmetrics-text"), TEXT))
        }
    ),
)
async def metrics(request: AnyRequest, gateway: NamedDependency[Gateway]) -> Response[bytes]:
    """Figures for Prometheus."""
    text, media_type = gateway.metrics.text(await gateway.health.snapshot(), request.headers.get("accept", ""))
    if media_type.startswith("text/"):  # Litestar adds it
        media_type = media_type.removesuffix("; charset=utf-8")
    return Response(text, media_type=media_type, headers=NO_STORE)


ROUTES = (health, gpus, index, static, livez, readyz, metrics)
