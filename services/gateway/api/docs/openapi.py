"""The OpenAPI document: declarations of routes beyond their types, and rules that hold for all of them.

A route declares its errors with `problems`, and with `operation` what Litestar cannot see: headers of responses, bodies
that are decoded by hand, audio.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import msgspec
from litestar import Litestar, Router
from litestar.enums import HttpMethod
from litestar.handlers import HTTPRouteHandler
from litestar.openapi import OpenAPIConfig
from litestar.openapi.datastructures import ResponseSpec
from litestar.openapi.spec import (
    License,
    OpenAPIHeader,
    OpenAPIMediaType,
    OpenAPIResponse,
    OpenAPIType,
    Operation,
    RequestBody,
    Schema,
    Server,
    Tag,
)
from litestar.openapi.spec.enums import OpenAPIFormat
from litestar.routes import BaseRoute, HTTPRoute
from litestar.types import Method

from services.gateway.api.guards import is_for_own_pages
from services.gateway.api.responses import BYTES
from services.gateway.errors import MEDIA_TYPE, PROBLEMS, Problem
from shared.audio.forms import CONTENT_TYPES
from shared.schema.base import VERSION
from shared.schema.request import GenerateRequest

Marks = Mapping[tuple[str, str], Mapping[str, Any]]  # the marks of routes, by path and method in lower case
TEXT = Schema(type=OpenAPIType.STRING)
NUMBER = Schema(type=OpenAPIType.INTEGER, minimum=0)
BINARY = Schema(type=OpenAPIType.STRING, format=OpenAPIFormat.BINARY)
AUDIO = dict.fromkeys((*CONTENT_TYPES.values(), BYTES), BINARY)  # the content of a response with audio, by media type
ETAG = {"ETag": ("for If-None-Match", TEXT)}
_SCHEMAS = "#/components/schemas/"
_EVERYWHERE = (500,)
_RETRIED = (429, 503)
# Generated clients name their modules after these tags, so they stay as they are.
_OTHERS = "house"
_TAGS = {
    "generate": "songs",
    "recordings": "recordings",
    "livez": "probes",
    "readyz": "probes",
}  # by the first part of the path
_TAG_WORDS = {
    "songs": "Ask for songs, follow them, get their audio.",
    "recordings": "Upload audio of your own, for songs to go on from.",
    _OTHERS: "Servers, workers and devices.",
    "probes": "Probes of the system that runs the gateway.",
}
_EXAMPLE = {
    "lyrics": "[Verse]\nHello world\n[Chorus]\nLa la la",
    "tags": "pop,piano,english",
    "max_duration_ms": 20_000,
}
_ID = "5f0c4f0a-9a37-42b0-8f6c-7d116d2ce1a5"
_EXAMPLES = {  # of the bodies that clients read most
    "AcceptedBody": {
        "job_id": _ID,
        "status": "queued",
        "status_url": f"/generate/{_ID}/status",
        "stream_url": f"/generate/{_ID}/stream",
        "result_url": f"/generate/{_ID}/result",
        "events_url": f"/generate/{_ID}/events",
        "queue_position": 0,
        "eta": "2026-01-31T12:03:20.000Z",
    },
    "StatusBody": {
        "job_id": _ID,
        "status": "generating",
        "progress": 31.5,
        "created_at": "2026-01-31T12:00:00.000Z",
        "completed_at": None,
        "playable_seconds": 25.6,
        "stage": "generating",
        "eta": "2026-01-31T12:03:20.000Z",
        "seed": 7,
        "format": "flac",
    },
    "RecordingBody": {
        "recording_id": _ID,
        "status": "encoding",
        "progress": 40.0,
        "created_at": "2026-01-31T12:00:00.000Z",
        "completed_at": None,
        "duration": 93.2,
        "sample_rate": 44100,
        "channels": 2,
        "size": 2_330_112,
        "upload_format": "mp3",
        "audio_url": f"/recordings/{_ID}/audio",
        "peaks_url": f"/recordings/{_ID}/peaks",
        "title": "Demo",
    },
    "CancelledBody": {"job_id": _ID, "status": "cancelled"},
}
_JOB_ID = {"type": "string", "pattern": "^[0-9A-Za-z-]{1,64}$", "examples": [_ID]}
_OF_IDS = {"job_id": "of the song", "recording_id": "of the recording"}
_DESCRIPTION = """Makes songs from lyrics and style tags: ask for one, follow its events, fetch its audio.

Errors are problem details (RFC 9457), also for addresses that are not described here (404 `not-found`) and methods that
an address does not take (405 `method-not-allowed`). The events of a song are sent live over a websocket and as
server-sent events; `/asyncapi.json` describes them."""


def problems(*codes: int) -> dict[int, ResponseSpec]:
    """Declare the statuses of the problem details that a route answers with. 500 need not be named."""
    return {
        code: ResponseSpec(Problem, media_type=MEDIA_TYPE, generate_examples=False, description="refused")
        for code in codes
    }


@dataclass(frozen=True)
class Answer:
    """Declaration of a response beyond the type of its body."""

    description: str = ""
    headers: Mapping[str, tuple[str, Schema]] = field(default_factory=dict)  # by name: description and type
    content: Mapping[str, Schema] | None = None  # by media type; None: derived from the type that the route returns


def operation(body: RequestBody | None = None, answers: Mapping[int, Answer] | None = None) -> type[Operation]:
    """Build the `operation_class` of a route."""

    @dataclass
    class Documented(Operation):
        def __post_init__(self) -> None:
            self.parameters = self.parameters or []  # also written where it is empty
            self.request_body = body or self.request_body
            self.responses = dict(self.responses or {})
            for code, answer in (answers or {}).items():
                found = cast("OpenAPIResponse", self.responses.setdefault(str(code), OpenAPIResponse("")))
                found.description = answer.description or found.description
                found.headers = (found.headers or {}) | {
                    name: OpenAPIHeader(description=words, schema=schema)
                    for name, (words, schema) in answer.headers.items()
                }
                if answer.content is not None:
                    found.content = {kind: OpenAPIMediaType(schema=schema) for kind, schema in answer.content.items()}

    return Documented


def json_body(kind: type[msgspec.Struct], example: Mapping[str, Any]) -> RequestBody:
    """Document a JSON body that is decoded by hand, which Litestar does not see.

    Structures in it stand under `$defs`, until `complete` moves them to where its references lead.
    """
    _, components = msgspec.json.schema_components([kind], ref_template=_SCHEMAS + "{name}")
    schema = components.pop(kind.__name__) | {"$defs": components}
    media = OpenAPIMediaType(schema=cast("Schema", schema), example=dict(example))
    return RequestBody(content={"application/json": media}, required=True)


def file_body() -> RequestBody:
    """Document a body that is a file, or a form with one.

    Any content type is taken. One is named: generated clients have a function, or a branch, for each.
    """
    form = Schema(type=OpenAPIType.OBJECT, properties={"file": BINARY}, required=["file"])
    content = {
        BYTES: OpenAPIMediaType(schema=BINARY),
        "multipart/form-data": OpenAPIMediaType(schema=form),
    }
    return RequestBody(
        content=content,
        required=True,
        description="the file, under any content type: what it is, its bytes say; or a form with the file as its only "
        "field",
    )


def song_body() -> RequestBody:
    """Document the body of a request for a song."""
    return json_body(GenerateRequest, _EXAMPLE)


def config() -> OpenAPIConfig:
    """Configure how Litestar makes the document."""
    return OpenAPIConfig(
        title="HeartMuLa on JetStream",
        version=VERSION,
        summary="A self-hosted music generator",
        description=_DESCRIPTION,
        license=License(name="Apache-2.0", identifier="Apache-2.0"),
        servers=[Server(url="/", description="the gateway that serves this document")],
        tags=[Tag(name=name, description=words) for name, words in _TAG_WORDS.items()],
        openapi_router=_NoRoutes("/schema", route_handlers=[]),
        use_handler_docstrings=True,
        operation_id_creator=_operation_id,
    )


def _operation_id(handler: HTTPRouteHandler, method: Method | HttpMethod, _: list[Any]) -> str:
    return handler.handler_name if method != HttpMethod.HEAD else f"{handler.handler_name}_head"


class _NoRoutes(Router):
    """Replaces Litestar's own routes, which answer HTML to wrong addresses and compress nothing: see `docs.routes`."""

    def register(self, value: Any) -> list[BaseRoute]:
        """Add nothing."""
        return []


def marks_of(app: Litestar) -> Marks:
    """Collect the marks of all routes of an application."""
    routes = [route for route in app.routes if isinstance(route, HTTPRoute)]
    return {
        (route.path_format, method.lower()): handler.opt
        for route in routes
        for handler in route.route_handlers
        for method in handler.http_methods
    }


def complete(document: dict[str, Any], marks: Marks) -> dict[str, Any]:
    """Complete the document by rules for all routes and by their marks; changes and returns it."""
    schemas = document["components"]["schemas"]
    document["components"]["securitySchemes"] = {
        "key": {"type": "http", "scheme": "bearer", "description": "an API key, where the gateway asks for one"}
    }
    _describe_problem(schemas["Problem"])
    for name, example in _EXAMPLES.items():
        schemas[name]["examples"] = [example]
    for path, item in document["paths"].items():
        for method, found in item.items():
            found["summary"] = found["description"].partition("\n")[0]
            found["tags"] = [_TAGS.get(path.split("/")[1], _OTHERS)]
            for known in found.get("parameters", ()):
                if (of := _OF_IDS.get(known["name"])) is not None:
                    known["schema"], known["description"] = _JOB_ID, of
            marked = marks[path, method]
            refused = {401: not marked.get("public"), 403: is_for_own_pages(method, marked)}
            if refused[401]:
                found["security"] = [{"key": []}, {}]  # {}: where the gateway has no keys
            refused[421] = not marked.get("any_host")
            always = (*_EVERYWHERE, *(code for code, holds in refused.items() if holds))
            _complete_answers(found["responses"], always, head=method == "head")
            content = found.get("requestBody", {}).get("content", {}).get("application/json")
            if content and (title := content["schema"].get("title")):  # one name for one structure
                schemas |= content["schema"].pop("$defs")
                schemas[title] = content["schema"]
                content["schema"] = {"$ref": _SCHEMAS + title}
    return document


def _describe_problem(schema: dict[str, Any]) -> None:
    kinds = "\n".join(f"- `/problems/{kind}` ({found.status}): {found.title}" for kind, found in PROBLEMS.items())
    properties = schema["properties"]
    properties["type"] |= {"pattern": "^/problems/[a-z-]+$", "description": f"Never changes; one of\n\n{kinds}"}
    properties["detail"]["description"] = "what to change"
    properties["status"] |= {"minimum": 400, "maximum": 599}


def _complete_answers(answers: dict[str, Any], everywhere: Iterable[int], *, head: bool) -> None:
    if "application/json" in answers.get("400", {}).get("content", {}):  # Litestar's own 400, which is never sent
        del answers["400"]
    for always in everywhere:
        answers[str(always)] = {"content": {MEDIA_TYPE: {"schema": {"$ref": _SCHEMAS + "Problem"}}}}
    for code, answer in answers.items():
        if MEDIA_TYPE in answer.get("content", {}):
            kinds = [kind for kind, found in PROBLEMS.items() if found.status == int(code)]
            answer["description"] = "; ".join(PROBLEMS[kind].title for kind in kinds) or "The request was refused"
            answer["content"][MEDIA_TYPE]["examples"] = {kind: {"value": _example(kind)} for kind in kinds}
            if int(code) in _RETRIED:
                answer.setdefault("headers", {})["Retry-After"] = {
                    "description": "seconds to wait before asking again",
                    "schema": {"type": "integer", "minimum": 0},
                }
            if code == "401":
                answer["headers"] = {"WWW-Authenticate": {"description": "`Bearer`", "schema": {"type": "string"}}}
        if head or code == "204":
            answer.pop("content", None)


def _example(kind: str) -> dict[str, Any]:
    return {
        "type": f"/problems/{kind}",
        "title": PROBLEMS[kind].title,
        "status": PROBLEMS[kind].status,
        "detail": "what to change, in a sentence",
    }
