"""A finished song: its audio, and the peaks to draw it from."""

from typing import Any, cast, get_args

from litestar import Request, route
from litestar.datastructures import State
from litestar.di import NamedDependency
from litestar.enums import HttpMethod
from litestar.openapi.datastructures import ResponseSpec
from litestar.openapi.spec import OpenAPIType, Schema
from litestar.params import FromPath
from litestar.types import ASGIApp

from services.gateway.api.audio_response import audio_answer, peaks_answer
from services.gateway.api.docs.openapi import (
    BINARY,
    NUMBER,
    TEXT,
    Answer,
    operation,
    parameter,
    refusals,
)
from services.gateway.auth.api_keys import Caller
from services.gateway.container import Gateway
from services.gateway.songs import status as songs
from shared.audio.files import CONTENT_TYPES
from shared.audio.peaks import PeaksBody
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


ROUTES = (result, peaks)
