"""The AsyncAPI document: events of songs, and requests of NATS clients. Generated from the types that are sent."""

from functools import cache
from typing import Any, get_args

import msgspec

from services.gateway.api.nats_bodies import ERROR_CODES, RefusedBody, StoredBody, TakenBody
from services.gateway.songs.event_feed import SnapshotBody
from services.gateway.submission.refused import Refused, RefusedEvent
from shared.nats.subjects import event_subject, intake_subject, record_subject, submit_subject
from shared.schema.base import VERSION
from shared.schema.event import AnyEvent, CloudEvent
from shared.schema.job import Job
from shared.schema.request import GenerateRequest

_EVENTS: tuple[type[msgspec.Struct], ...] = get_args(AnyEvent)
_REFUSED = str(Refused.__struct_config__.tag)
_SCHEMAS = "#/components/schemas/"
_MESSAGES = "#/components/messages/"


@cache
def document() -> bytes:
    """The document as JSON, in the form of AsyncAPI 3.0."""
    return msgspec.json.encode(_document())


def _document() -> dict[str, Any]:
    kinds = [str(event.__struct_config__.tag) for event in _EVENTS]
    address = "/generate/{job_id}/events"
    after = {"type": "string", "pattern": "^[0-9]{1,18}$", "description": "id of the latest event that is known"}
    return {
        "asyncapi": "3.0.0",
        "info": {
            "title": "HeartMuLa on JetStream: events",
            "version": VERSION,
            "description": "The events of songs, live, and the requests of NATS clients. The HTTP API: /schema.",
            "license": {"name": "Apache-2.0", "url": "https://www.apache.org/licenses/LICENSE-2.0"},
        },
        "defaultContentType": "application/json",
        "servers": {
            "socket": _server("ws", "127.0.0.1:8000", "the gateway"),
            "stream": _server("http", "127.0.0.1:8000", "the gateway"),
            "nats": _server("nats", "127.0.0.1:4222", "the NATS server of the system"),
        },
        "channels": {
            "socket": _channel("socket", address, ["snapshot", *kinds], _SOCKET, ["job_id"])
            | {"bindings": {"ws": {"method": "GET", "query": {"type": "object", "properties": {"after": after}}}}},
            "stream": _channel("stream", address, ["snapshot", *kinds], _STREAM, ["job_id"]),
            "events": _channel(
                "nats",
                event_subject("{tenant}", "{job_id}", "{kind}"),
                [*kinds, "requestRefused"],
                _SUBJECTS,
                ["tenant", "job_id", "kind"],
            ),
            "submit": _channel("nats", submit_subject("{tenant}"), ["request"], _SUBMIT, ["tenant"]),
            "intake": _channel("nats", intake_subject("{tenant}"), ["request"], _INTAKE, ["tenant"]),
            "lookup": _channel(
                "nats", record_subject("{tenant}", "{job_id}"), ["lookup"], _LOOKUP, ["tenant", "job_id"]
            ),
            "replies": _channel("nats", None, ["taken", "stored", "record", "refused"], _REPLIES, []),
        },
        "operations": {
            "tellSocket": _operation("send", "socket", "A client gets events over a websocket."),
            "tellStream": _operation("send", "stream", "A client gets server-sent events.")
            | {"bindings": {"http": {"method": "GET", "query": {"type": "object", "properties": {"after": after}}}}},
            "tellSubjects": _operation("send", "events", "The gateway and the workers publish events."),
            "takeSong": _operation("receive", "submit", "A NATS client asks for a song.") | _REPLY,
            "storeRequest": _operation("receive", "intake", "A NATS client leaves a request for a song.") | _REPLY,
            "lookUpSong": _operation("receive", "lookup", "A NATS client asks for the record of a song.") | _REPLY,
        },
        "components": {"messages": _messages(), "schemas": _schemas()},
    }


_SOCKET = (
    "A websocket: a snapshot, the events after `after` if that is given, then everything live. Closes with 1000 when "
    "the song has ended, 1008 for an `after` that is no id, 1012 (connect again, with `after`), 4401 without "
    "a valid key where keys are needed, 4404 for an unknown song. Where no keys are needed, the handshake of a page of "
    "another origin is refused with 403."
)
_STREAM = (
    "Server-sent events, the same as over the websocket. `event:` is the type, `id:` the id, `data:` the JSON. The "
    "header Last-Event-ID means what `after` means, and takes precedence. The stream ends when the song has ended."
)
_SUBJECTS = "The stream EVENTS, as it is stored: `id` is the sender's there, the sequence of the message orders them."
_SUBMIT = "A request, or a JetStream publish. The header Nats-Msg-Id makes a repeated request harmless."
_INTAKE = (
    "A JetStream publish, or a request. It is stored, answered, and submitted afterwards, however long that takes. "
    "`job_id` is the id that the song will have; a request that cannot be fulfilled becomes the event `refused`."
)
_LOOKUP = "A request without a body, answered with the record of the song as it is now."
_REPLIES = (
    "The reply subject of a request. It has to be an inbox: its first token is _INBOX, _INBOX_client, _INBOX_ with the "
    "tenant, or one that the gateway is configured to allow. Other requests are dropped."
)
_REPLY: dict[str, Any] = {
    "reply": {
        "address": {
            "location": "$message.header#/reply",
            "description": "the reply subject of the NATS message, which is no header of it",
        },
        "channel": {"$ref": "#/channels/replies"},
    }
}
_PARAMETERS: dict[str, Any] = {
    "job_id": {"description": "of the song"},
    "tenant": {"description": "whose song it is; `local` where there are no API keys", "default": "local"},
    "kind": {"description": "of event", "enum": [*(str(event.__struct_config__.tag) for event in _EVENTS), _REFUSED]},
}


def _server(protocol: str, host: str, words: str) -> dict[str, Any]:
    return {
        "host": "{host}",
        "protocol": protocol,
        "description": words,
        "variables": {"host": {"default": host, "description": "host and port"}},
    }


def _channel(
    server: str, address: str | None, messages: list[str], words: str, parameters: list[str]
) -> dict[str, Any]:
    return {
        "address": address,
        "description": words,
        "servers": [{"$ref": f"#/servers/{server}"}],
        "messages": {name: {"$ref": _MESSAGES + name} for name in messages},
        **({"parameters": {name: _PARAMETERS[name] for name in parameters}} if parameters else {}),
    }


def _operation(action: str, channel: str, words: str) -> dict[str, Any]:
    return {"action": action, "channel": {"$ref": f"#/channels/{channel}"}, "summary": words}


def _messages() -> dict[str, Any]:
    key = {"type": "string", "minLength": 1, "maxLength": 255, "pattern": "^[!-~]+$"}
    found: dict[str, Any] = {
        "snapshot": _message(SnapshotBody),
        "request": _message(GenerateRequest)
        | {"headers": {"type": "object", "properties": {"Nats-Msg-Id": key | {"description": "a key of your own"}}}},
        "taken": _message(TakenBody),
        "record": _message(Job),
        "lookup": {"name": "Lookup", "summary": "An empty request.", "payload": {"type": "string", "maxLength": 0}},
        "refused": _message(RefusedBody),
        "stored": _message(StoredBody),
        "requestRefused": _message(RefusedEvent),
    }
    codes = ", ".join(f"{code} {kind}" for kind, code in ERROR_CODES.items())
    found["refused"]["description"] = f"`err_code`: {codes}."
    for event in _EVENTS:
        kind = str(event.__struct_config__.tag)
        narrowed = {
            "type": {"const": f"heartmula.song.{kind}"},
            "data": {"$ref": _SCHEMAS + event.__name__},
        }
        found[kind] = _message(event) | {
            "payload": {"allOf": [{"$ref": _SCHEMAS + CloudEvent.__name__}, {"type": "object", "properties": narrowed}]}
        }
    return found


def _message(kind: type[msgspec.Struct]) -> dict[str, Any]:
    return {
        "name": kind.__name__,
        "summary": (kind.__doc__ or "").partition("\n")[0],
        "contentType": "application/json",
        "payload": {"$ref": _SCHEMAS + kind.__name__},
    }


def _schemas() -> dict[str, Any]:
    kinds = [SnapshotBody, CloudEvent, GenerateRequest, TakenBody, StoredBody, Job, RefusedBody, RefusedEvent, *_EVENTS]
    _, components = msgspec.json.schema_components(kinds, ref_template=_SCHEMAS + "{name}")
    return {name: _plain(schema) for name, schema in components.items()}


def _plain(schema: Any) -> Any:
    """Remove OpenAPI's discriminators: AsyncAPI means something else by the word, and tags are constants anyway."""
    if isinstance(schema, dict):
        return {name: _plain(value) for name, value in schema.items() if name != "discriminator"}
    return [_plain(item) for item in schema] if isinstance(schema, list) else schema
