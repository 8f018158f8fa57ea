"""Routes of audio: of finished songs, of songs that are being made, and the peaks to draw it from."""

from typing import Any, cast

from litestar import Request, route
from litestar.di import NamedDependency
from litestar.openapi.datastructures import ResponseSpec
from litestar.params import FromPath
from litestar.types import ASGIApp

from services.gateway.api.audio_response import AudioResponses
from services.gateway.api.audio_stream import AudioStreams
from services.gateway.api.conditional import Conditions
from services.gateway.api.docs.openapi import AUDIO, ETAG, NUMBER, TEXT, Answer, operation, problems
from services.gateway.api.parameters import (
    Format,
    From,
    IfNoneMatch,
    IfRange,
    Range,
    StreamFormat,
    audio_format,
    start_second,
    stream_format,
)
from services.gateway.api.responses import GET_AND_HEAD, named_as_asked
from services.gateway.api.stream_parts import Wanted
from services.gateway.auth.api_keys import Caller
from services.gateway.songs.status import Songs
from shared.audio.forms import plain
from shared.audio.peaks import PeaksBody

AnyRequest = Request[Any, Any, Any]

_AUDIO = ETAG | {
    "Accept-Ranges": ("`bytes`", TEXT),
    "Content-Length": ("bytes", NUMBER),
    "Content-Disposition": ("a file name", TEXT),
}
FILE_ANSWERS = {  # of a whole file, of songs and of recordings
    200: Answer("the audio", _AUDIO, AUDIO),
    206: Answer(
        "the part that was asked for",
        _AUDIO | {"Content-Range": ("`bytes first-last/size`", TEXT)},
        AUDIO,
    ),
    304: Answer("the audio is the same", ETAG),
    416: Answer(headers={"Content-Range": ("`bytes */size`", TEXT)}),
}


@route(
    "/generate/{job_id:str}/result",
    http_method=GET_AND_HEAD,
    operation_class=operation(
        answers=FILE_ANSWERS | {409: Answer(headers={"Retry-After": ("seconds to wait before asking again", NUMBER)})},
    ),
    responses=problems(404, 409, 410, 416, 422, 503),
    name="result",
)
async def result(
    request: AnyRequest,
    songs: NamedDependency[Songs],
    audio: NamedDependency[AudioResponses],
    caller: NamedDependency[Caller],
    job_id: FromPath[str],
    if_none_match: IfNoneMatch = None,
    format: Format = None,  # noqa: A002  # the name of the parameter
    range_: Range = None,
    if_range: IfRange = None,
) -> ASGIApp:
    """The audio of a finished song; byte ranges are served.

    In another format than it was made in, it is converted when that is first asked for, which takes some seconds.
    """
    job = await songs.find(caller.tenant, job_id)
    conditions = Conditions(request.method, if_none_match, range_, if_range)
    return named_as_asked(
        request.headers.get("accept"), cast("ASGIApp", await audio.audio(job, audio_format(format), conditions))
    )


_LIVE = {
    "Accept-Ranges": ("`bytes`", TEXT),
    "Cache-Control": ("`no-store` while the song is made", TEXT),
    "Content-Disposition": ("a file name", TEXT),
    "Content-Length": ("bytes, where they are known", NUMBER),
    "ETag": ("for If-Range, from the first byte of a song on: another one where its audio was made anew", TEXT),
}


@route(
    "/generate/{job_id:str}/stream",
    http_method=GET_AND_HEAD,
    operation_class=operation(
        answers={
            200: Answer(
                "the audio, as it is made: it ends cleanly when the song ends, however that ends. A connection that "
                "is cut before can be taken up again with a range",
                _LIVE,
                AUDIO,
            ),
            206: Answer(
                "the audio from the byte that was asked for on",
                _LIVE
                | {
                    "Content-Range": (
                        "`bytes first-last/size`; while the song is made `bytes first-last/*`, where the last byte of "
                        "an open range is 1099511627775 (RFC 8673): it goes on to the song's end",
                        TEXT,
                    )
                },
                AUDIO,
            ),
            304: Answer("the audio of a finished song is the same", ETAG),
            409: Answer(
                "nothing can be heard for a minute now",
                headers={"Retry-After": ("seconds to wait before asking again", NUMBER)},
            ),
            416: Answer(headers={"Content-Range": ("`bytes */size`", TEXT)}),
        },
    ),
    responses=problems(404, 409, 410, 416, 422, 503),
    name="stream",
)
async def stream(
    request: AnyRequest,
    songs: NamedDependency[Songs],
    streams: NamedDependency[AudioStreams],
    caller: NamedDependency[Caller],
    job_id: FromPath[str],
    format: StreamFormat = "flac",  # noqa: A002  # the name of the parameter
    from_: From = "0",
    if_none_match: IfNoneMatch = None,
    range_: Range = None,
    if_range: IfRange = None,
) -> ASGIApp:
    """The audio of a song from its beginning, while it is made; of a finished song, its file.

    Waits up to a minute for the first of it. FLAC is sent as it will be in the finished file, but for the first 42
    bytes. Byte ranges are served, several or the last bytes of a song only when it is finished.
    """
    form, start = plain(stream_format(format)), start_second(from_)
    job = await songs.find(caller.tenant, job_id)
    conditions = Conditions(request.method, if_none_match, range_, if_range)
    return named_as_asked(request.headers.get("accept"), await streams.stream(Wanted(job, form, start, conditions)))


@route(
    "/generate/{job_id:str}/peaks",
    http_method=GET_AND_HEAD,
    operation_class=operation(
        answers={
            304: Answer("the peaks are the same", ETAG),
            409: Answer(headers={"Retry-After": ("seconds to wait before asking again", NUMBER)}),
        },
    ),
    responses=problems(404, 409, 410, 503)
    | {200: ResponseSpec(PeaksBody, generate_examples=False, description="as audiowaveform writes it")},
    name="peaks",
)
async def peaks(
    request: AnyRequest,
    songs: NamedDependency[Songs],
    audio: NamedDependency[AudioResponses],
    caller: NamedDependency[Caller],
    job_id: FromPath[str],
    if_none_match: IfNoneMatch = None,
) -> ASGIApp:
    """The lowest and highest sample of every short stretch of a song, to draw it from.

    While it is made, they are those of what can be heard of it.
    """
    job = await songs.find(caller.tenant, job_id)
    headers = request.headers  # a range of the peaks is served, and not worth a word in the documentation
    conditions = Conditions(request.method, if_none_match, headers.get("range"), headers.get("if-range"))
    return await audio.peaks(job, conditions)


ROUTES = (result, stream, peaks)
