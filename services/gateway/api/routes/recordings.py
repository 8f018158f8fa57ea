"""Routes of recordings: to upload, list, show, hear and remove them."""

from collections.abc import AsyncIterator
from typing import Any, cast

from litestar import Request, Response, delete, get, post, route
from litestar.di import NamedDependency
from litestar.openapi.datastructures import ResponseSpec
from litestar.params import FromPath
from litestar.types import ASGIApp

from services.gateway.api.audio_response import AudioResponses
from services.gateway.api.conditional import Conditions
from services.gateway.api.docs.openapi import ETAG, NUMBER, TEXT, Answer, file_body, operation, problems
from services.gateway.api.http_protocol import at_own_pace, is_whole
from services.gateway.api.parameters import (
    Cursor,
    Format,
    IfNoneMatch,
    IfRange,
    Limit,
    Range,
    RecordingStatusFilter,
    Title,
    audio_format,
    page_size,
    recording_status_filter,
    title_of,
)
from services.gateway.api.responses import GET_AND_HEAD, NO_STORE, named_as_asked
from services.gateway.api.routes.audio import FILE_ANSWERS
from services.gateway.auth.api_keys import Caller
from services.gateway.errors import ApiError, answer_error
from services.gateway.recordings.removal import RecordingRemoval
from services.gateway.recordings.status import RecordingBody, Recordings, RecordingsBody, place_of_recording
from services.gateway.recordings.uploads import UploadRequest, Uploads
from services.gateway.songs.index import place_of
from shared.audio.peaks import PeaksBody

AnyRequest = Request[Any, Any, Any]


def answer_and_close(request: AnyRequest, error: Exception) -> Response[bytes]:
    """Answer an exception; where not all of the body was read, nothing reads the rest: the connection is closed."""
    answer = answer_error(request, error)
    if not is_whole(request.scope):
        answer.headers["Connection"] = "close"
    return answer


_PLACE = {
    "Location": ("where the recording is", TEXT),
    "Retry-After": ("seconds to wait before asking for it, while it is not ready", NUMBER),
}


@post(
    "/recordings",
    status_code=202,
    operation_class=operation(
        body=file_body(),
        answers={
            202: Answer("the recording waits to be encoded", _PLACE),
            200: Answer("the same file was uploaded before, and is ready", _PLACE),
        },
    ),
    responses=problems(400, 408, 409, 413, 415, 422, 429, 501, 503)
    | {200: ResponseSpec(RecordingBody, generate_examples=False)},
    exception_handlers={Exception: answer_and_close},
    request_max_body_size=None,  # uploads have limits of their own
)
async def upload_recording(
    request: AnyRequest,
    uploads: NamedDependency[Uploads],
    recordings: NamedDependency[Recordings],
    caller: NamedDependency[Caller],
    title: Title = None,
) -> Response[RecordingBody]:
    """Upload a recording: FLAC, WAV, MP3 or Ogg. It is durably in the queue when this answers.

    The same file is the same recording: uploaded again, it is answered as it is, and lives for a week from then.
    """
    length = request.headers.get("content-length", "")
    asked = UploadRequest(
        body=_body_of(request),
        content_type=request.headers.get("content-type", ""),
        content_length=int(length) if length.isascii() and length.isdigit() else None,
        title=title_of(title),
    )
    with at_own_pace(request.scope):
        job = (await uploads.take(caller, asked)).job
    ready = job.status == "completed"
    return Response(
        recordings.describe_stored(job),
        status_code=200 if ready else 202,
        headers=NO_STORE | {"Location": place_of_recording(job.job_id)} | ({} if ready else {"Retry-After": "1"}),
    )


async def _body_of(request: AnyRequest) -> AsyncIterator[bytes]:
    """The bytes of a body as they come. Raises a 408 `ApiError` where the client leaves."""
    while True:
        event = await request.receive()
        if event["type"] != "http.request":
            raise ApiError(408, "refused", "the connection ended before the whole body was there")
        yield event["body"]
        if not event["more_body"]:
            return


@get("/recordings", responses=problems(422, 503))
async def list_recordings(
    recordings: NamedDependency[Recordings],
    caller: NamedDependency[Caller],
    limit: Limit = "20",
    cursor: Cursor = None,
    status: RecordingStatusFilter = None,
) -> Response[RecordingsBody]:
    """Recordings, newest first, a page at a time."""
    size, state = page_size(limit), recording_status_filter(status)
    after = None if cursor is None else place_of(cursor)
    return Response(await recordings.page(caller.tenant, size, after, state), headers=NO_STORE)


@route("/recordings/{recording_id:str}", http_method=GET_AND_HEAD, responses=problems(404, 503), name="recording")
async def recording(
    recordings: NamedDependency[Recordings], caller: NamedDependency[Caller], recording_id: FromPath[str]
) -> Response[RecordingBody]:
    """A recording, and how its encoding is coming along."""
    body = await recordings.describe(await recordings.find(caller.tenant, recording_id))
    return Response(body, status_code=200, headers=NO_STORE)


@route(
    "/recordings/{recording_id:str}/audio",
    http_method=GET_AND_HEAD,
    operation_class=operation(answers=FILE_ANSWERS),
    responses=problems(404, 410, 416, 422, 503),
    name="recording_audio",
)
async def recording_audio(
    request: AnyRequest,
    recordings: NamedDependency[Recordings],
    audio: NamedDependency[AudioResponses],
    caller: NamedDependency[Caller],
    recording_id: FromPath[str],
    if_none_match: IfNoneMatch = None,
    format: Format = None,  # noqa: A002  # the name of the parameter
    range_: Range = None,
    if_range: IfRange = None,
) -> ASGIApp:
    """The audio of a recording as FLAC, or converted; byte ranges are served. It can be heard from the beginning."""
    job = await recordings.find(caller.tenant, recording_id)
    conditions = Conditions(request.method, if_none_match, range_, if_range)
    return named_as_asked(
        request.headers.get("accept"), cast("ASGIApp", await audio.audio(job, audio_format(format), conditions))
    )


@route(
    "/recordings/{recording_id:str}/peaks",
    http_method=GET_AND_HEAD,
    operation_class=operation(answers={304: Answer("the peaks are the same", ETAG)}),
    responses=problems(404, 410, 503)
    | {200: ResponseSpec(PeaksBody, generate_examples=False, description="as audiowaveform writes it")},
    name="recording_peaks",
)
async def recording_peaks(
    request: AnyRequest,
    recordings: NamedDependency[Recordings],
    audio: NamedDependency[AudioResponses],
    caller: NamedDependency[Caller],
    recording_id: FromPath[str],
    if_none_match: IfNoneMatch = None,
) -> ASGIApp:
    """The lowest and highest sample of every short stretch of a recording, to draw it from."""
    job = await recordings.find(caller.tenant, recording_id)
    headers = request.headers  # a range of the peaks is served, and not worth a word in the documentation
    conditions = Conditions(request.method, if_none_match, headers.get("range"), headers.get("if-range"))
    return await audio.peaks(job, conditions)


@delete("/recordings/{recording_id:str}", responses=problems(404, 409, 503))
async def remove_recording(
    recording_removal: NamedDependency[RecordingRemoval],
    caller: NamedDependency[Caller],
    recording_id: FromPath[str],
) -> None:
    """Remove a recording, whatever its state. Songs that go on from it stay whole."""
    await recording_removal.remove(caller.tenant, recording_id)


ROUTES = (upload_recording, list_recordings, recording, recording_audio, recording_peaks, remove_recording)
