"""Routes of songs: to request, list, show, cancel and remove them."""

from typing import Any, cast

import msgspec
from litestar import Request, Response, delete, get, post, route
from litestar.di import NamedDependency
from litestar.params import FromPath

from services.gateway.api.conditional import tag_matches, tag_of
from services.gateway.api.docs.openapi import ETAG, NUMBER, TEXT, Answer, json_body, operation, problems, song_body
from services.gateway.api.parameters import (
    Cursor,
    Forget,
    IdempotencyKey,
    IfNoneMatch,
    Limit,
    ParentFilter,
    StatusFilter,
    page_size,
    parent_filter,
    status_filter,
    truth,
)
from services.gateway.api.request_body import json_of
from services.gateway.api.responses import GET_AND_HEAD, NO_STORE, retry_seconds
from services.gateway.auth.api_keys import Caller
from services.gateway.auth.quota import Quotas
from services.gateway.songs.cancel import CancelledBody, Canceller
from services.gateway.songs.index import place_of
from services.gateway.songs.status import Song, Songs, SongsBody, StatusBody
from services.gateway.songs.tree import TreeBody, Trees
from services.gateway.submission.accepted import AcceptedBody
from services.gateway.submission.continuing import Continuations
from services.gateway.submission.service import Submission
from services.gateway.submission.validation import FitBody, FitRequest, ModelLimits, decode_fit

AnyRequest = Request[Any, Any, Any]


@post(
    "/generate",
    status_code=202,
    operation_class=operation(
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
    ),
    responses=problems(400, 404, 409, 410, 413, 415, 422, 429, 503),
)
async def generate(
    request: AnyRequest,
    submission: NamedDependency[Submission],
    caller: NamedDependency[Caller],
    idempotency_key: IdempotencyKey = None,
) -> Response[AcceptedBody]:
    """Ask for a song. It is durably in the queue when this answers.

    The same request with the same Idempotency-Key is answered with the same song, whatever became of the first answer.
    """
    accepted = await submission.submit(caller, await json_of(request), idempotency_key)
    retry = {"Retry-After": str(retry_seconds(accepted.job, 1))}
    return Response(accepted.body, headers=NO_STORE | {"Location": accepted.body.status_url} | retry)


@post(
    "/api/fit",
    status_code=200,
    operation_class=operation(body=json_body(FitRequest, {"lyrics": "[Verse]\nHello world", "tags": "pop,piano"})),
    responses=problems(400, 404, 409, 410, 413, 415, 422, 429, 503),
)
async def fit(
    request: AnyRequest,
    quotas: NamedDependency[Quotas],
    model_limits: NamedDependency[ModelLimits],
    continuations: NamedDependency[Continuations],
    caller: NamedDependency[Caller],
) -> Response[FitBody]:
    """How long a song may be beside these lyrics and tags: prompt and frames share the model's positions."""
    quotas.take_text(caller, request.client.host if request.client else "")
    text = decode_fit(await json_of(request))
    kept, of_frames = None, 0
    if text.continue_from is not None:
        origin = await continuations.find(caller.tenant, text.continue_from)
        kept, of_frames = origin.frames, origin.all_frames
    body = await model_limits.measure(text, caller.limits.max_duration_ms, kept, of_frames)
    return Response(body, headers=NO_STORE)


@get("/generate", responses=problems(422, 503))
async def listing(
    songs: NamedDependency[Songs],
    caller: NamedDependency[Caller],
    limit: Limit = "20",
    cursor: Cursor = None,
    status: StatusFilter = None,
    parent: ParentFilter = None,
) -> Response[SongsBody]:
    """Songs, newest first, a page at a time."""
    size, state, origin = page_size(limit), status_filter(status), parent_filter(parent)
    after = None if cursor is None else place_of(cursor)
    return Response(await songs.page(caller.tenant, size, after, state, origin), headers=NO_STORE)


@route("/generate/{job_id:str}", http_method=GET_AND_HEAD, responses=problems(404, 503), name="song")
async def song(songs: NamedDependency[Songs], caller: NamedDependency[Caller], job_id: FromPath[str]) -> Response[Song]:
    """A song with what was asked for."""
    body = await songs.describe_with_request(await songs.find(caller.tenant, job_id))
    return Response(body, status_code=200, headers=NO_STORE)


@route("/generate/{job_id:str}/tree", http_method=GET_AND_HEAD, responses=problems(404, 503), name="tree")
async def tree(
    trees: NamedDependency[Trees], caller: NamedDependency[Caller], job_id: FromPath[str]
) -> Response[TreeBody]:
    """All songs that go back to the same one as this song, and how they go on from one another."""
    return Response(await trees.find(caller.tenant, job_id), status_code=200, headers=NO_STORE)


@route(
    "/generate/{job_id:str}/status",
    http_method=GET_AND_HEAD,
    operation_class=operation(
        answers={200: Answer(headers=ETAG), 304: Answer("nothing in the answer has changed", ETAG)}
    ),
    responses=problems(404, 503),
    name="status",
)
async def status(
    songs: NamedDependency[Songs],
    caller: NamedDependency[Caller],
    job_id: FromPath[str],
    if_none_match: IfNoneMatch = None,
) -> Response[StatusBody]:
    """How a song is coming along. With If-None-Match, 304 while nothing in the answer has changed."""
    body = await songs.describe(await songs.find(caller.tenant, job_id))
    etag = tag_of(msgspec.json.encode(body))
    headers = {"ETag": etag, "Cache-Control": "no-cache"}
    if tag_matches(if_none_match or "", etag):
        return cast("Response[StatusBody]", Response(b"", status_code=304, headers=headers))
    return Response(body, status_code=200, headers=headers)


@delete("/generate/{job_id:str}", status_code=200, responses=problems(404, 409, 422, 503))
async def cancel(
    canceller: NamedDependency[Canceller],
    caller: NamedDependency[Caller],
    job_id: FromPath[str],
    forget: Forget = "false",
) -> Response[CancelledBody]:
    """Cancel a song, queued or running; with `forget`, remove one that has ended, its audio and its record."""
    end = canceller.remove if truth("forget", forget) else canceller.cancel
    return Response(await end(caller.tenant, job_id), headers=NO_STORE)


ROUTES = (generate, listing, song, tree, status, cancel, fit)
