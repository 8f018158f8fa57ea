"""The ASGI application over an open `Gateway`."""

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
from services.gateway.api.routes import audio, songs, system
from services.gateway.api.security_headers import secure
from services.gateway.api.sse import event_stream
from services.gateway.api.static_files import Pages
from services.gateway.api.websocket import events
from services.gateway.container import Gateway
from services.gateway.errors import answer_error
from services.gateway.submission.validation import MAX_BODY


def create_app(gateway: Gateway) -> Litestar:
    """Routes, and one way to answer every error. The gateway belongs to the caller, who closes it."""
    pages, rules = Pages(), PageRules(gateway.settings, gateway.authenticator)
    origins = [origin.strip() for origin in gateway.settings.cors_origins.split(",") if origin.strip()]
    handlers = [*songs.ROUTES, *audio.ROUTES, *system.ROUTES, *session.ROUTES, *api_docs.ROUTES, event_stream]
    return Litestar(
        [_options(handlers), *handlers, events],
        dependencies={
            "caller": Provide(provide_caller, sync_to_thread=False),
            "gateway": Provide(lambda: gateway, sync_to_thread=False),
            "pages": Provide(lambda: pages, sync_to_thread=False),
            "rules": Provide(lambda: rules, sync_to_thread=False),
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
                "Range",
            ],
            expose_headers=["ETag", "Location", "Retry-After", "Content-Range"],
        )
        if origins
        else None,
        guards=[rules.guard, need_key],
        state=State({"authenticator": gateway.authenticator, "outage": gateway.outage}),
        before_send=[secure],
        exception_handlers={Exception: answer_error},
        request_max_body_size=MAX_BODY,
        logging_config=None,  # the process's own is enough; Litestar's would log bodies of errors
        openapi_config=openapi.config(),
    )


def _options(handlers: Iterable[HTTPRouteHandler]) -> HTTPRouteHandler:
    """Which methods an address takes. Litestar's own handler knows those of the first route at an address alone."""

    @route(
        sorted({path for handler in handlers for path in handler.paths}),
        http_method=HttpMethod.OPTIONS,
        status_code=204,
        include_in_schema=False,
        opt=PUBLIC,  # it tells methods alone
    )
    async def options(request: Request[Any, Any, Any]) -> Response[None]:
        there = (found for found in request.app.routes if isinstance(found, HTTPRoute))
        methods = next(found.methods for found in there if found.path_format == request.scope["path_template"])
        return Response(None, headers={"Allow": ", ".join(sorted(methods))})

    return options
