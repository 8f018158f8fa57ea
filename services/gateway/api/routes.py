"""The HTTP routes. Each says what it takes and answers; how is elsewhere."""

from typing import Any, cast, get_args

import msgspec
from litestar import Request, Response, delete, get, post, route
from litestar.datastructures import State
from litestar.di import NamedDependency
from litestar.enums import HttpMethod
from litestar.exceptions import InternalServerException
from litestar.openapi.datastructures import ResponseSpec
from litestar.openapi.spec import OpenAPIType, Schema
from litestar.params import FromPath
from litestar.types import ASGIApp

from services.gateway.api.audio_response import audio_answer, peaks_answer
from services.gateway.api.conditional import tag_matches, tag_of
from services.gateway.api.docs.openapi import (
    BINARY,
    NUMBER,
    TEXT,
    Answer,
    json_body,
    operation,
    parameter,
    refusals,
    song_body,
)
from services.gateway.api.guards import PROBE, PUBLIC
from services.gateway.api.static_files import Pages
from services.gateway.auth.api_keys import Caller
from services.gateway.container import Gateway
from services.gateway.errors import ApiError
from services.gateway.monitoring import devices as gpu
from services.gateway.monitoring.health import HealthBody
from services.gateway.songs import status as songs
from services.gateway.submission.service import AcceptedBody
from services.gateway.submission.validation import FitBody, FitRequest, decode_fit
from shared.audio.files import CONTENT_TYPES
from shared.audio.peaks import PeaksBody
from shared.schema.job import Status
from shared.schema.request import AudioFormat

NO_STORE = {"Cache-Control": "no-store"}
GET_AND_HEAD = [HttpMethod.GET, HttpMethod.HEAD]
AnyRequest = Request[Any, Any, State]


_ETAG = {"ETag": ("for If-None-Match", TEXT)}
_AUDIO = _ETAG | {
    "Accept-Ranges": ("`bytes`", TEXT),
    "Content-Length": ("bytes", NUMBER),
    "Content-Disposition": ("a file name", TEXT),
}
_IF_NONE_MATCH = parameter("If-None-Match", "header", "the ETag of an earlier answer: 304 where it still holds")


_TAKES_SONG = operation(
    parameter(
        "Idempotency-Key",
        "header",
        "of your own choice: the same request under the same key is answered with the same song",
        Schema(type=OpenAPIType.STRING, min_length=1, max_length=255, pattern="^[!-~]+$"),
    ),
    body=song_body(),
    answers={
        202: Answer(
            "the song is in the queue",
            {
                "Location": ("where its status is", TEXT),
                "Retry-After": ("seconds to wait before asking for it", NUMBER),
            },
        )
    },
)


@post("/generate", status_code=202, operation_class=_TAKES_SONG, responses=refusals(400, 409, 413, 415, 422, 429, 503))
async def generate(
    request: AnyRequest, gateway: NamedDependency[Gateway], caller: NamedDependency[Caller]
) -> Response[AcceptedBody]:
    """Ask for a song. It is durably in the queue when this answers.

    The same request with the same Idempotency-Key is answered with the same song, whatever became of the first answer.
    """
    body = await _json_of(request)
    key = request.headers.get("idempotency-key")
    accepted = (await gateway.submission.submit(caller, body, key)).body
    return Response(accepted, headers=NO_STORE | {"Location": accepted.status_url, "Retry-After": "1"})


async def _json_of(request: AnyRequest) -> bytes:
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":  # it also keeps out what other sites' pages may send without asking first
        raise ApiError(415, "unsupported-media-type", "send JSON, with Content-Type: application/json")
    try:
        return await request.body()
    except InternalServerException:  # what Litestar makes of a client that leaves before it has sent all
        raise ApiError(408, "refused", "the connection ended before the whole body was there") from None


@post(
    "/api/fit",
    status_code=200,
    operation_class=operation(body=json_body(FitRequest, {"lyrics": "[Verse]\nHello world", "tags": "pop,piano"})),
    responses=refusals(400, 413, 415, 422, 429),
)
async def fit(
    request: AnyRequest, gateway: NamedDependency[Gateway], caller: NamedDependency[Caller]
) -> Response[FitBody]:
    """How long a song may be beside these lyrics and tags: prompt and frames share the model's positions."""
    gateway.quotas.take_text(caller, request.client.host if request.client else "")
    text = decode_fit(await _json_of(request))
    return Response(await gateway.model_limits.measure(text, caller.limits.max_duration_ms), headers=NO_STORE)


# Checked by hand, so that what is wrong is told in the same words as elsewhere.
_TAKES_PAGE = operation(
    parameter(
        "limit",
        "query",
        "songs on a page, at most",
        Schema(type=OpenAPIType.INTEGER, minimum=1, maximum=songs.MAX_PAGE, default=20),
    ),
    parameter("cursor", "query", "`next` of the page before"),
    parameter(
        "status", "query", "songs in this state alone", Schema(type=OpenAPIType.STRING, enum=list(get_args(Status)))
    ),
)


@get("/generate", operation_class=_TAKES_PAGE, responses=refusals(422, 503))
async def listing(
    request: AnyRequest, gateway: NamedDependency[Gateway], caller: NamedDependency[Caller]
) -> Response[songs.SongsBody]:
    """Songs, newest first, a page at a time."""
    asked = request.query_params
    body = await songs.listing(
        gateway, caller.tenant, asked.get("limit", "20"), asked.get("cursor"), asked.get("status")
    )
    return Response(body, headers=NO_STORE)


@route("/generate/{job_id:str}", http_method=GET_AND_HEAD, responses=refusals(404, 503), name="song")
async def song(
    gateway: NamedDependency[Gateway], caller: NamedDependency[Caller], job_id: FromPath[str]
) -> Response[songs.Song]:
    """A song with what was asked for."""
    body = await songs.describe_whole(gateway, await songs.find_job(gateway, caller.tenant, job_id))
    return Response(body, status_code=200, headers=NO_STORE)


@route(
    "/generate/{job_id:str}/status",
    http_method=GET_AND_HEAD,
    operation_class=operation(
        _IF_NONE_MATCH,
        answers={200: Answer(headers=_ETAG), 304: Answer("nothing in the answer has changed", _ETAG)},
    ),
    responses=refusals(404, 503),
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
    operation_class=operation(
        _IF_NONE_MATCH,
        parameter(
            "format",
            "query",
            "another format than the song was made in",
            Schema(type=OpenAPIType.STRING, enum=list(get_args(AudioFormat))),
        ),
        parameter("Range", "header", "one range of bytes: `bytes=0-1023`, `bytes=1024-`, `bytes=-1024`"),
        parameter("If-Range", "header", "the ETag of the audio that the range belongs to"),
        answers={
            200: Answer("the audio", _AUDIO, dict.fromkeys(CONTENT_TYPES.values(), BINARY)),
            206: Answer(
                "the part that was asked for",
                _AUDIO | {"Content-Range": ("`bytes first-last/size`", TEXT)},
                dict.fromkeys(CONTENT_TYPES.values(), BINARY),
            ),
            304: Answer("the audio is the same", _ETAG),
            409: Answer(headers={"Retry-After": ("seconds to wait before asking again", NUMBER)}),
            416: Answer(headers={"Content-Range": ("`bytes */size`", TEXT)}),
        },
    ),
    responses=refusals(404, 409, 410, 416, 422, 503),
    name="result",
)
async def result(
    request: AnyRequest, gateway: NamedDependency[Gateway], caller: NamedDependency[Caller], job_id: FromPath[str]
) -> ASGIApp:
    """The audio of a finished song; byte ranges are served.

    In another format than it was made in, it is converted when that is first asked for, which takes some seconds.
    """
    job = await songs.find_job(gateway, caller.tenant, job_id)
    wanted = request.query_params.get("format")
    return cast("ASGIApp", await audio_answer(gateway, job, request.method, request.headers, wanted))


@route(
    "/generate/{job_id:str}/peaks",
    http_method=GET_AND_HEAD,
    operation_class=operation(_IF_NONE_MATCH, answers={304: Answer("the peaks are the same", _ETAG)}),
    responses=refusals(404, 409, 410, 503)
    | {200: ResponseSpec(PeaksBody, generate_examples=False, description="as audiowaveform writes it")},
    name="peaks",
)
async def peaks(
    request: AnyRequest, gateway: NamedDependency[Gateway], caller: NamedDependency[Caller], job_id: FromPath[str]
) -> ASGIApp:
    """The lowest and highest sample of every short stretch of a finished song, to draw it from."""
    job = await songs.find_job(gateway, caller.tenant, job_id)
    return cast("ASGIApp", await peaks_answer(gateway, job, request.method, request.headers))


_TAKES_FORGET = operation(
    parameter("forget", "query", "remove an ended song instead", Schema(type=OpenAPIType.BOOLEAN, default=False))
)


@delete(
    "/generate/{job_id:str}", status_code=200, operation_class=_TAKES_FORGET, responses=refusals(404, 409, 422, 503)
)
async def cancel(
    request: AnyRequest, gateway: NamedDependency[Gateway], caller: NamedDependency[Caller], job_id: FromPath[str]
) -> Response[songs.CancelledBody]:
    """Cancel a song, queued or running; with `forget`, remove one that has ended, its audio and its record."""
    asked = request.query_params.get("forget", "false")
    if asked not in ("true", "false"):
        raise ApiError(422, "invalid-request", "forget has to be true or false", field="forget")
    end = songs.forget if asked == "true" else songs.cancel
    return Response(await end(gateway, caller.tenant, job_id), headers=NO_STORE)


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


ROUTES = (
    *(generate, listing, song, status, result, peaks, cancel, fit, health, gpus),
    *(index, static, livez, readyz, metrics),
)
