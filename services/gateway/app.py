"""The ASGI application: routes, their dependencies, guards, and one handler for all errors."""

from collections.abc import Iterable
from typing import Any

from litestar import Litestar, Request, Response, route
from litestar.config.cors import CORSConfig
from litestar.datastructures import State
from litestar.di import Provide
from litestar.enums import HttpMethod
from litestar.handlers import HTTPRouteHandler
from litestar.routes import HTTPRoute

from services.gateway.api import browser_session as session
from services.gateway.api.docs import openapi
from services.gateway.api.docs import routes as api_docs
from services.gateway.api.guards import PUBLIC, PageRules, need_key, provide_caller
from services.gateway.api.routes import audio, recordings, songs, system
from services.gateway.api.security_headers import secure
from services.gateway.api.sse import event_stream
from services.gateway.api.static_files import StaticFiles
from services.gateway.api.websocket import events
from services.gateway.compatible import errors as vendors
from services.gateway.compatible import routes as compatible
from services.gateway.compatible.browser_headers import REQUEST_HEADERS, RESPONSE_HEADERS
from services.gateway.container import Container
from services.gateway.errors import answer_error
from services.gateway.mcp import route as mcp
from shared.schema.request import MAX_BODY


def create_app(container: Container) -> Litestar:
    """Build the application from the parts of a gateway. The container belongs to the caller, who closes it."""
    rules = PageRules(container.settings, container.authenticator)
    origins = [origin.strip() for origin in container.settings.cors_origins.split(",") if origin.strip()]
    parts = {
        "audio": container.audio,
        "authenticator": container.authenticator,
        "canceller": container.canceller,
        "continuations": container.continuations,
        "devices": container.devices,
        "event_feeds": container.event_feeds,
        "health": container.health,
        "mcp_endpoint": container.mcp,
        "metrics": container.metrics,
        "model_limits": container.model_limits,
        "nats": container.nc,
        "quotas": container.quotas,
        "recording_removal": container.recording_removal,
        "recordings": container.recordings,
        "rules": rules,
        "served_model": container.served_model,
        "song_answers": container.song_answers,
        "song_index": container.song_index,
        "songs": container.songs,
        "static_files": StaticFiles(),
        "streams": container.streams,
        "submission": container.submission,
        "trees": container.trees,
        "uploads": container.uploads,
    }
    handlers = [
        *songs.ROUTES,
        *audio.ROUTES,
        *recordings.ROUTES,
        *system.ROUTES,
        *mcp.ROUTES,
        *session.ROUTES,
        *api_docs.ROUTES,
        *compatible.ROUTES,
        event_stream,
    ]
    return Litestar(
        [_options(handlers), *handlers, events],
        dependencies={
            "caller": Provide(provide_caller, sync_to_thread=False),
            **{name: _always(part) for name, part in parts.items()},
        },
        cors_config=CORSConfig(
            allow_origins=origins,
            allow_methods=["GET", "HEAD", "POST", "DELETE"],
            allow_headers=[
                "Authorization",
                "Content-Type",
                "Idempotency-Key",
                "If-None-Match",
                "Last-Event-ID",
                "Mcp-Method",
                "Mcp-Name",
                "Mcp-Protocol-Version",
                "Range",
                *REQUEST_HEADERS,
            ],
            expose_headers=["ETag", "Location", "Retry-After", "Content-Range", *RESPONSE_HEADERS],
        )
        if origins
        else None,
        guards=[rules.guard, need_key],
        state=State({"authenticator": container.authenticator, "outage": container.outage}),
        before_send=[secure],
        exception_handlers={Exception: _answer_error},
        request_max_body_size=MAX_BODY,
        logging_config=None,  # the process has its own; Litestar's would log bodies of errors
        openapi_config=openapi.config(),
    )


def _answer_error(request: Request[Any, Any, Any], error: Exception) -> Response[bytes]:
    if request.scope["path"].startswith(vendors.PREFIX):
        return vendors.answer_error(request, error)
    return answer_error(request, error)


def _always(part: object) -> Provide:
    """Declare a dependency that is one object for all requests."""
    return Provide(lambda: part, sync_to_thread=False, use_cache=True)


def _options(handlers: Iterable[HTTPRouteHandler]) -> HTTPRouteHandler:
    """Handler of OPTIONS at all addresses. Litestar's own knows only the methods of the first route at each."""

    @route(
        sorted({path for handler in handlers for path in handler.paths}),
        http_method=HttpMethod.OPTIONS,
        status_code=204,
        include_in_schema=False,
        opt=PUBLIC,  # it answers with nothing but methods
    )
    async def options(request: Request[Any, Any, Any]) -> Response[None]:
        there = (found for found in request.app.routes if isinstance(found, HTTPRoute))
        methods = next(found.methods for found in there if found.path_format == request.scope["path_template"])
        return Response(None, headers={"Allow": ", ".join(sorted(methods))})

    return options
