"""The HTTP routes. Each says what it takes and answers; how is elsewhere."""

from dataclasses import dataclass
from typing import Any, cast, get_args

import msgspec
from litestar import Request, Response, delete, get, post, route
from litestar.datastructures import State
from litestar.di import NamedDependency
from litestar.enums import HttpMethod
from litestar.openapi.datastructures import ResponseSpec
from litestar.openapi.spec import OpenAPIMediaType, OpenAPIType, Operation, Parameter, RequestBody, Schema
from litestar.params import FromPath
from litestar.types import ASGIApp

from services.gateway import gpu, songs
from services.gateway.access import Caller
from services.gateway.gateway import Gateway
from services.gateway.health import HealthBody
from services.gateway.pages import Pages
from services.gateway.problems import MEDIA_TYPE, Problem, Refusal
from services.gateway.ranges import tag_matches, tag_of
from services.gateway.results import audio_answer
from services.gateway.submission import AcceptedBody
from shared.messages import GenerateRequest, Status

NO_STORE = {"Cache-Control": "no-store"}
GET_AND_HEAD = [HttpMethod.GET, HttpMethod.HEAD]
AnyRequest = Request[Any, Any, State]


def _refusals(*codes: int) -> dict[int, ResponseSpec]:
    return {
        code: ResponseSpec(Problem, media_type=MEDIA_TYPE, generate_examples=False, description="refused")
        for code in codes
    }


@dataclass
class _TakesRequest(Operation):
    """The body is decoded strictly by hand, so Litestar does not know of it."""

    def __post_init__(self) -> None:
        _, components = msgspec.json.schema_components([GenerateRequest])
        schema = cast("Schema", components["GenerateRequest"])  # written out as it is
        key = Schema(type=OpenAPIType.STRING, min_length=1, max_length=255, pattern="^[!-~]+$")
        self.parameters = [
            Parameter(name="Idempotency-Key", param_in="header", schema=key, description="of your own choice")
        ]
        self.request_body = RequestBody(content={"application/json": OpenAPIMediaType(schema=schema)}, required=True)


@post("/generate", status_code=202, operation_class=_TakesRequest, responses=_refusals(400, 413, 415, 422, 429, 503))
async def generate(
    request: AnyRequest, gateway: NamedDependency[Gateway], caller: NamedDependency[Caller]
) -> Response[AcceptedBody]:
    """Ask for a song. It is durably in the queue when this answers.

    The same request with the same Idempotency-Key is answered with the same song, whatever became of the first answer.
    """
    media_type = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if media_type != "application/json":  # it also keeps other sites' forms out
        raise Refusal(415, "unsupported-media-type", "send JSON, with Content-Type: application/json")
    key = request.headers.get("idempotency-key")
    accepted = (await gateway.submission.submit(caller, await request.body(), key)).body
    return Response(accepted, headers=NO_STORE | {"Location": accepted.status_url, "Retry-After": "1"})


@dataclass
class _TakesPage(Operation):
    """The parameters are checked by hand, so that what is wrong is told in the same words as elsewhere."""

    def __post_init__(self) -> None:
        schemas = {
            "limit": Schema(type=OpenAPIType.INTEGER, minimum=1, maximum=songs.MAX_PAGE, default=20),
            "cursor": Schema(type=OpenAPIType.STRING, description="`next` of the page before"),
            "status": Schema(type=OpenAPIType.STRING, enum=list(get_args(Status))),
        }
        self.parameters = [Parameter(name=name, param_in="query", schema=schema) for name, schema in schemas.items()]


@get("/generate", operation_class=_TakesPage, responses=_refusals(422, 503))
async def listing(
    request: AnyRequest, gateway: NamedDependency[Gateway], caller: NamedDependency[Caller]
) -> Response[songs.SongsBody]:
    """Songs, newest first, a page at a time."""
    asked = request.query_params
    body = await songs.listing(
        gateway, caller.tenant, asked.get("limit", "20"), asked.get("cursor"), asked.get("status")
    )
    return Response(body, headers=NO_STORE)


@route(
    "/generate/{job_id:str}/status",
    http_method=GET_AND_HEAD,
    responses=_refusals(404, 503) | {304: ResponseSpec(None, description="it is as If-None-Match says")},
    name="status",
)
async def status(
    request: AnyRequest, gateway: NamedDependency[Gateway], caller: NamedDependency[Caller], job_id: FromPath[str]
) -> Response[songs.StatusBody]:
    """How a song is coming along. With If-None-Match, 304 while nothing in the answer has changed."""
    body = await songs.describe(gateway, await songs.find_job(gateway, caller.tenant, job_id))
    etag = tag_of(msgspec.json.encode(body))
    headers = {"ETag": etag, "Cache-Control": "no-cache"}
    if tag_matches(request.headers.get("if-none-match", ""), etag):
        return cast("Response[songs.StatusBody]", Response(b"", status_code=304, headers=headers))
    return Response(body, status_code=200, headers=headers)


@route(
    "/generate/{job_id:str}/result",
    http_method=GET_AND_HEAD,
    responses=_refusals(404, 409, 410, 416, 503),
    name="result",
)
async def result(
    request: AnyRequest, gateway: NamedDependency[Gateway], caller: NamedDependency[Caller], job_id: FromPath[str]
) -> ASGIApp:
    """The audio of a finished song; byte ranges are served."""
    job = await songs.find_job(gateway, caller.tenant, job_id)
    return cast("ASGIApp", await audio_answer(gateway, job, request.method, request.headers))


@delete("/generate/{job_id:str}", status_code=200, responses=_refusals(404, 409, 503))
async def cancel(
    gateway: NamedDependency[Gateway], caller: NamedDependency[Caller], job_id: FromPath[str]
) -> Response[songs.CancelledBody]:
    """Cancel a song, queued or running."""
    return Response(await songs.cancel(gateway, caller.tenant, job_id), headers=NO_STORE)


@get("/health")
async def health(gateway: NamedDependency[Gateway]) -> Response[HealthBody]:
    """Whether a song could be taken and made; 503 when it could not even be taken."""
    body = (await gateway.health.snapshot()).body
    return Response(body, status_code=503 if body.status == "unavailable" else 200, headers=NO_STORE)


@get("/api/gpu", responses=_refusals(503))
async def gpus(gateway: NamedDependency[Gateway], caller: NamedDependency[Caller]) -> Response[gpu.GpusBody]:
    """Every device, who holds it and who waits for it."""
    return Response(await gpu.gpus(gateway, caller.tenant), headers=NO_STORE)


@route("/", http_method=GET_AND_HEAD, include_in_schema=False)
async def index(request: AnyRequest, pages: NamedDependency[Pages]) -> Response[bytes]:
    """The web page."""
    return pages.answer(request, "index.html")


@route("/static/{name:path}", http_method=GET_AND_HEAD, include_in_schema=False)
async def static(request: AnyRequest, pages: NamedDependency[Pages], name: FromPath[str]) -> Response[bytes]:
    """What the web page is made of."""
    return pages.answer(request, name.lstrip("/"))


@get("/livez", include_in_schema=False)
async def livez() -> dict[str, bool]:
    """This process answers."""
    return {"ok": True}


@get("/readyz", include_in_schema=False)
async def readyz(gateway: NamedDependency[Gateway]) -> Response[dict[str, bool]]:
    """NATS is connected and set up."""
    return Response({"ok": gateway.ready}, status_code=200 if gateway.ready else 503, headers=NO_STORE)


@get("/metrics", include_in_schema=False)
async def metrics(request: AnyRequest, gateway: NamedDependency[Gateway]) -> Response[bytes]:
    """Figures for Prometheus."""
    text, media_type = gateway.metrics.text(await gateway.health.snapshot(), request.headers.get("accept", ""))
    return Response(text, media_type=media_type, headers=NO_STORE)


ROUTES = (generate, listing, status, result, cancel, health, gpus, index, static, livez, readyz, metrics)
