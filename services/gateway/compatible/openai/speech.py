"""Requests for speech as OpenAI's clients send them, read as requests for songs."""

from dataclasses import dataclass
from typing import Any, Literal, cast

import msgspec

from services.gateway.errors import ApiError
from shared.audio.forms import Form
from shared.errors import InvalidRequest
from shared.schema.request import GenerateRequest

_FORMS = {
    "mp3": Form("mp3"),
    "opus": Form("opus", 48_000),
    "flac": Form("flac"),
    "wav": Form("wav"),
    "pcm": Form("pcm", 24_000, channels=1),  # as OpenAI's, which players take for granted
}
_RENAMED = {"lyrics": "input", "tags": "instructions", "format": "response_format"}  # ours, by which they are not taken
_THEIRS = ("model", "input", "instructions", "voice", "response_format", "speed", "stream_format")
# What a request names in another way, and what has no meaning where a client waits for one song.
_ELSEWHERE = ("lyrics", "tags", "format", "variants", "not_before")
_OURS = tuple(name for name in GenerateRequest.__struct_fields__ if name not in _ELSEWHERE)


@dataclass(frozen=True)
class Speech:
    """A request for speech."""

    song: dict[str, Any]  # the fields of a `GenerateRequest`, not validated
    form: Form
    events: bool  # whether the audio is to be sent as events


def read_speech(body: bytes) -> Speech:
    """Read the body of a request. Raises `InvalidRequest`, or an `ApiError` where it is no JSON."""
    fields = _fields_of(body)
    for name in fields:
        if name in _RENAMED:
            raise InvalidRequest(_RENAMED[name], f"is the name for {name} here; give it under that name")
        if name not in _THEIRS and name not in _OURS:
            raise InvalidRequest(name[:100], f"is not a field; there are {', '.join((*_THEIRS, *_OURS))}")
    if not isinstance(fields.get("model"), str) or not fields["model"].strip():
        raise InvalidRequest("model", "is required; any name will do, for there is one model")
    if "input" not in fields:
        raise InvalidRequest("input", "is required: the lyrics of the song")
    if fields.get("speed", 1) != 1:
        raise InvalidRequest("speed", "has to be 1: a song is made at one speed; name another one in instructions")
    song = {name: value for name, value in fields.items() if name in _OURS}
    song |= {"lyrics": fields["input"], "tags": fields.get("instructions", "")}
    return Speech(song, _form_of(fields.get("response_format", "mp3")), _stream_format(fields) == "sse")


def _fields_of(body: bytes) -> dict[str, Any]:
    """The fields that have a value: null stands for none."""
    try:
        fields = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ApiError(400, "malformed-json", f"{error}; the body must be one JSON object in UTF-8") from None
    if not isinstance(fields, dict):
        raise ApiError(400, "malformed-json", "the body must be one JSON object")
    return {name: value for name, value in fields.items() if value is not None}


def _form_of(name: object) -> Form:
    if name == "aac":
        raise InvalidRequest("response_format", "aac is not made here; take mp3, opus, flac, wav or pcm")
    if not isinstance(name, str) or name not in _FORMS:
        raise InvalidRequest("response_format", f"has to be one of {', '.join(_FORMS)}")
    return _FORMS[name]


def _stream_format(fields: dict[str, Any]) -> Literal["audio", "sse"]:
    found = fields.get("stream_format", "audio")
    if found not in ("audio", "sse"):
        raise InvalidRequest("stream_format", "has to be audio or sse")
    return cast("Literal['audio', 'sse']", found)
