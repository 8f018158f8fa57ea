"""Routes of OpenAI's API: speech, and a single model. The list of models is in `services.gateway.compatible.models`."""

from typing import Any

from litestar import Request, Response, get, post
from litestar.di import NamedDependency
from litestar.params import FromPath
from litestar.types import ASGIApp

from services.gateway.api.request_body import json_of
from services.gateway.api.responses import NO_STORE
from services.gateway.auth.api_keys import Caller
from services.gateway.compatible.openai.envelopes import AudioEnvelope, EventEnvelope
from services.gateway.compatible.openai.errors import model_not_found
from services.gateway.compatible.openai.models import describe_model
from services.gateway.compatible.openai.speech import read_speech
from services.gateway.compatible.requested_songs import digest_of_request
from services.gateway.compatible.served_model import ServedModel
from services.gateway.compatible.song_answer import Order, SongAnswers
from services.gateway.submission.validation import ModelLimits


@post("/v1/audio/speech", status_code=200, include_in_schema=False)
async def speech(
    request: Request[Any, Any, Any],
    song_answers: NamedDependency[SongAnswers],
    served_model: NamedDependency[ServedModel],
    model_limits: NamedDependency[ModelLimits],
    caller: NamedDependency[Caller],
) -> ASGIApp:
    """A song, sent while it is made: `input` are its lyrics, `instructions` its tags."""
    body = await json_of(request)
    asked = read_speech(body)
    order = Order(
        caller=caller,
        digest=digest_of_request(request, body),
        song=asked.song,
        form=asked.form,
        envelope=EventEnvelope(served_model, model_limits) if asked.events else AudioEnvelope(served_model),
    )
    return song_answers.answer(order)


@get("/v1/models/{name:str}", include_in_schema=False)
async def model(served_model: NamedDependency[ServedModel], name: FromPath[str]) -> Response[dict[str, Any]]:
    """A model."""
    if name != served_model.name:
        raise model_not_found(name, served_model.name)
    return Response(describe_model(served_model), headers=NO_STORE)


ROUTES = (speech, model)
