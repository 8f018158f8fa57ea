"""Songs: asked for, listed, looked at, cancelled and removed."""

from typing import Any, cast, get_args

import msgspec
from litestar import Request, Response, delete, get, post, route
from litestar.datastructures import State
from litestar.di import NamedDependency
from litestar.enums import HttpMethod
from litestar.exceptions import InternalServerException
from litestar.openapi.spec import OpenAPIType, Schema
from litestar.params import FromPath

from services.gateway.api.conditional import tag_matches, tag_of
from services.gateway.api.docs.openapi import (
    NUMBER,
    TEXT,
    Answer,
    json_body,
    operation,
    parameter,
    refusals,
    song_body,
)
from services.gateway.auth.api_keys import Caller
from services.gateway.container import Gateway
from services.gateway.errors import ApiError
from services.gateway.songs import cancel as ends
from services.gateway.songs import status as songs
from services.gateway.submission.service import AcceptedBody
from services.gateway.submission.validation import FitBody, FitRequest, decode_fit
from shared.schema.job import Status

NO_STORE = {"Cache-Control": "no-store"}
GET_AND_HEAD = [HttpMethod.GET, HttpMethod.HEAD]
AnyRequest = Request[Any, Any, State]


_ETAG = {"ETag": ("for If-None-Match", TEXT)}
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


_TAKES_FORGET = operation(
    parameter("forget", "query", "remove an ended song instead", Schema(type=OpenAPIType.BOOLEAN, default=False))
)


@delete(
    "/generate/{job_id:str}", status_code=200, operation_class=_TAKES_FORGET, responses=refusals(404, 409, 422, 503)
)
async def cancel(
    request: AnyRequest, gateway: NamedDependency[Gateway], caller: NamedDependency[Caller], job_id: FromPath[str]
) -> Response[ends.CancelledBody]:
    """Cancel a song, queued or running; with `forget`, remove one that has ended, its audio and its record."""
    asked = request.query_params.get("forget", "false")
    if asked not in ("true", "false"):
        raise ApiError(422, "invalid-request", "forget has to be true or false", field="forget")
    end = ends.forget if asked == "true" else ends.cancel
    return Response(await end(gateway, caller.tenant, job_id), headers=NO_STORE)


ROUTES = (generate, listing, song, status, cancel, fit)
