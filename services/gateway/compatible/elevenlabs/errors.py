"""Errors in the shape that ElevenLabs' clients read."""

from collections.abc import Mapping
from typing import Any

import msgspec
from litestar import Request, Response

from services.gateway.compatible.elevenlabs.requests import MusicRequest
from services.gateway.errors import ApiError, to_api_error

_QUERY = ("output_format", "enable_logging")
_STATE = "elevenlabs_fields"
_MEANT = {"lyrics": "the lines together", "tags": "the styles together", "max_duration_ms": "the length"}
_PROMPT_FIELDS = {"lyrics": "prompt", "tags": "prompt", "max_duration_ms": "music_length_ms"}
_TEXT_FIELDS = _PROMPT_FIELDS | {"lyrics": "lyrics_text"}
_PLAN_FIELDS = dict.fromkeys(_PROMPT_FIELDS, "composition_plan")

AnyRequest = Request[Any, Any, Any]


def name_fields(request: AnyRequest, asked: MusicRequest) -> None:
    """Have errors about the song that a request comes to name the fields of the request."""
    fields = _PROMPT_FIELDS if asked.lyrics_text is None else _TEXT_FIELDS
    request.state[_STATE] = fields if asked.composition_plan is None else _PLAN_FIELDS


def answer_error(request: AnyRequest, error: Exception) -> Response[bytes]:
    """Answer an exception that a handler raised: an exception handler of Litestar."""
    found = to_api_error(error, request.app.state.outage.retry_after(error))
    return Response(
        msgspec.json.encode({"detail": _detail(found, request.state.get(_STATE, {}))}),
        status_code=500 if found.kind == "no-audio" else found.status,  # the song failed or was cancelled
        media_type="application/json",
        headers={"Cache-Control": "no-store"} | found.headers,
    )


def _detail(error: ApiError, fields: Mapping[str, str]) -> list[dict[str, Any]] | dict[str, str]:
    """A list of fields for a 422, as FastAPI has it; else the kind of error, as in our own API, and words."""
    if error.status != 422:
        return {"status": error.kind, "message": error.detail}
    field, words = error.field, error.detail.removeprefix(f"{error.field}: ")
    if field in fields:
        field, words = fields[field], f"{_MEANT[field]}: {words}"
    path = [int(part) if part.isdecimal() else part for part in field.split(".") if part]
    return [{"loc": ["query" if field in _QUERY else "body", *path], "msg": words, "type": error.kind}]
