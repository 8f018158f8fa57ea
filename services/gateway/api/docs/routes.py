"""The routes of the documentation: Swagger UI from the files of its package, the OpenAPI and the AsyncAPI document."""

from functools import cache
from typing import Any

import msgspec
from litestar import Request, Response, route
from litestar.di import NamedDependency
from litestar.params import FromPath
from swagger_ui_bundle import swagger_ui_path

from services.gateway.api.docs.asyncapi import document
from services.gateway.api.docs.openapi import complete, marks_of
from services.gateway.api.guards import PUBLIC
from services.gateway.api.responses import GET_AND_HEAD
from services.gateway.api.static_files import POLICY, StaticFile, StaticFiles

_POLICY = f"{POLICY}; img-src 'self' data:"  # its style sheet holds its icons
_FILES = StaticFiles(swagger_ui_path, only=("swagger-ui.css", "swagger-ui-bundle.js"))


@route("/docs", http_method=GET_AND_HEAD, opt=PUBLIC, include_in_schema=False)
async def docs(request: Request[Any, Any, Any], static_files: NamedDependency[StaticFiles]) -> Response[bytes]:
    """Swagger UI."""
    return static_files.response(request, "docs.html", policy=_POLICY)


@route("/docs/{name:str}", http_method=GET_AND_HEAD, opt=PUBLIC, include_in_schema=False)
async def docs_file(request: Request[Any, Any, Any], name: FromPath[str]) -> Response[bytes]:
    """The files of Swagger UI."""
    return _FILES.response(request, name)


@route(["/schema", "/schema/openapi.json"], http_method=GET_AND_HEAD, opt=PUBLIC, include_in_schema=False)
async def schema(request: Request[Any, Any, Any]) -> Response[bytes]:
    """The OpenAPI document."""
    state = request.app.state
    if "schema" not in state:
        plain = msgspec.json.decode(msgspec.json.encode(request.app.openapi_schema.to_schema()))
        whole = complete(plain, marks_of(request.app))
        state["schema"] = StaticFile(msgspec.json.encode(whole), "application/json")
    file: StaticFile = state["schema"]
    return file.response(request)


@route("/asyncapi.json", http_method=GET_AND_HEAD, opt=PUBLIC, include_in_schema=False)
async def asyncapi(request: Request[Any, Any, Any]) -> Response[bytes]:
    """The AsyncAPI document: the events, and the subjects of NATS clients."""
    return _asyncapi().response(request)


@cache
def _asyncapi() -> StaticFile:
    return StaticFile(document(), "application/json")


ROUTES = (docs, docs_file, schema, asyncapi)
