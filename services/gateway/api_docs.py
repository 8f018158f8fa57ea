"""The API for people and machines: Swagger UI from the files of its package, and the AsyncAPI document."""

from typing import Any

from litestar import Request, Response, get, route
from litestar.di import NamedDependency
from litestar.enums import HttpMethod
from litestar.params import FromPath
from swagger_ui_bundle import swagger_ui_path

from services.gateway.asyncapi import document
from services.gateway.pages import POLICY, Pages

_POLICY = f"{POLICY}; img-src 'self' data:"  # its style sheet holds its icons
_FILES = Pages(swagger_ui_path, only=("swagger-ui.css", "swagger-ui-bundle.js"))


@route("/docs", http_method=[HttpMethod.GET, HttpMethod.HEAD], include_in_schema=False)
async def docs(request: Request[Any, Any, Any], pages: NamedDependency[Pages]) -> Response[bytes]:
    """Swagger UI."""
    return pages.answer(request, "docs.html", policy=_POLICY)


@route("/docs/{name:str}", http_method=[HttpMethod.GET, HttpMethod.HEAD], include_in_schema=False)
async def docs_file(request: Request[Any, Any, Any], name: FromPath[str]) -> Response[bytes]:
    """What Swagger UI is made of."""
    return _FILES.answer(request, name)


@get("/asyncapi.json", include_in_schema=False)
async def asyncapi() -> Response[bytes]:
    """The events, and the subjects of NATS clients."""
    return Response(document(), media_type="application/json")


ROUTES = (docs, docs_file, asyncapi)
