"""The ASGI application over an open `Gateway`."""

from litestar import Litestar
from litestar.config.cors import CORSConfig
from litestar.datastructures import State
from litestar.di import Provide

from services.gateway import api_docs, openapi, session
from services.gateway.access import need_key, provide_caller
from services.gateway.event_stream import event_stream
from services.gateway.gateway import Gateway
from services.gateway.headers import secure
from services.gateway.pages import Pages
from services.gateway.problems import answer_error
from services.gateway.routes import ROUTES
from services.gateway.sockets import events
from services.gateway.validation import MAX_BODY


def create_app(gateway: Gateway) -> Litestar:
    """Routes, and one way to answer every error. The gateway belongs to the caller, who closes it."""
    pages = Pages()
    origins = [origin.strip() for origin in gateway.settings.cors_origins.split(",") if origin.strip()]
    return Litestar(
        [*ROUTES, *session.ROUTES, *api_docs.ROUTES, events, event_stream],
        dependencies={
            "caller": Provide(provide_caller, sync_to_thread=False),
            "gateway": Provide(lambda: gateway, sync_to_thread=False),
            "pages": Provide(lambda: pages, sync_to_thread=False),
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
        guards=[need_key],
        state=State({"access": gateway.access}),
        before_send=[secure],
        exception_handlers={Exception: answer_error},
        request_max_body_size=MAX_BODY,
        logging_config=None,  # the process's own is enough; Litestar's would log bodies of errors
        openapi_config=openapi.config(),
    )
