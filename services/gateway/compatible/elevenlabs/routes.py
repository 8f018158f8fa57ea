"""Routes of ElevenLabs' API of music."""

from typing import Any

from litestar import Request, Response, post
from litestar.di import NamedDependency
from litestar.types import ASGIApp

from services.gateway.api.audio_response import AudioResponses
from services.gateway.api.request_body import json_of
from services.gateway.api.responses import NO_STORE
from services.gateway.auth.api_keys import Caller
from services.gateway.compatible.elevenlabs.envelopes import NOTES_HEADER, AudioEnvelope, DetailedEnvelope
from services.gateway.compatible.elevenlabs.errors import name_fields
from services.gateway.compatible.elevenlabs.output_formats import output_format
from services.gateway.compatible.elevenlabs.plan_templates import NOTES, write_plan
from services.gateway.compatible.elevenlabs.plans import compose
from services.gateway.compatible.elevenlabs.requests import MusicRequest, PlanRequest, decode
from services.gateway.compatible.requested_songs import digest_of_request
from services.gateway.compatible.song_answer import Envelope, Order, SongAnswers
from services.gateway.errors import ApiError
from shared.audio.forms import Form
from shared.errors import InvalidRequest

AnyRequest = Request[Any, Any, Any]


@post("/v1/music", status_code=200, include_in_schema=False)
async def music(
    request: AnyRequest, song_answers: NamedDependency[SongAnswers], caller: NamedDependency[Caller]
) -> ASGIApp:
    """A song as a whole file, once it is completed."""
    return song_answers.answer(await _order(request, caller, whole=True))


@post("/v1/music/stream", status_code=200, include_in_schema=False)
async def stream(
    request: AnyRequest, song_answers: NamedDependency[SongAnswers], caller: NamedDependency[Caller]
) -> ASGIApp:
    """A song, sent while it is made."""
    return song_answers.answer(await _order(request, caller, whole=False))


@post("/v1/music/detailed", status_code=200, include_in_schema=False)
async def detailed(
    request: AnyRequest,
    song_answers: NamedDependency[SongAnswers],
    audio: NamedDependency[AudioResponses],
    caller: NamedDependency[Caller],
) -> ASGIApp:
    """A song as a whole file, with its plan."""
    return song_answers.answer(await _order(request, caller, whole=True, details=audio))


@post("/v1/music/detailed/stream", include_in_schema=False)
async def detailed_stream() -> None:
    """Refuse what the SDK could not read: it drops the lines of server-sent events that have data."""
    raise ApiError(
        400, "refused", "events are not sent here; take /v1/music/stream for audio, or /v1/music/detailed for its plan"
    )


@post("/v1/music/plan", status_code=200, include_in_schema=False)
async def plan(request: AnyRequest) -> Response[dict[str, Any]]:
    """A composition plan by rule."""
    _require_logging(request)
    found = write_plan(decode(await json_of(request), PlanRequest))
    return Response(found, headers=NO_STORE | {NOTES_HEADER: "; ".join(NOTES)})


async def _order(request: AnyRequest, caller: Caller, *, whole: bool, details: AudioResponses | None = None) -> Order:
    """What a request asks for. Raises `InvalidRequest` or `ApiError`."""
    _require_logging(request)
    form = output_format(request.query_params.get("output_format"))
    body = await json_of(request)
    asked = decode(body, MusicRequest)
    composition = compose(asked)
    if asked.with_waveform_visual and details is None:
        raise InvalidRequest("with_waveform_visual", "goes with /v1/music/detailed")
    name_fields(request, asked)
    return Order(
        caller=caller,
        digest=digest_of_request(request, body),
        song=composition.song(asked.seed),
        form=form,
        envelope=_envelope(composition.notes, asked, form, details),
        whole=whole,
    )


def _envelope(notes: tuple[str, ...], asked: MusicRequest, form: Form, details: AudioResponses | None) -> Envelope:
    return AudioEnvelope(notes) if details is None else DetailedEnvelope(notes, asked, form, details)


def _require_logging(request: AnyRequest) -> None:
    if request.query_params.get("enable_logging", "true").lower() not in ("true", "1"):
        raise InvalidRequest("enable_logging", "songs and their requests are kept here for a week; leave it out")


ROUTES = (music, stream, detailed, detailed_stream, plan)
