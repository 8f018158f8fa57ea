"""Errors in OpenAI's shape, from which its SDK makes the exceptions that its users know."""

from typing import Any

import msgspec
from litestar import Request, Response

from services.gateway.compatible.vendor_errors import with_names
from services.gateway.errors import ApiError, to_api_error

_NAMES = {"lyrics": "input", "tags": "instructions"}  # of their fields, by ours
_STATUSES = {
    "invalid-request": 400,  # as theirs; ours is 422
    "no-audio": 500,  # the song failed or was cancelled
}
_CODES = {"unauthorized": "invalid_api_key", "too-many-requests": "rate_limit_exceeded"}
_MAY_CHANGE = ("queue-full", "too-many-requests", "not-ready", "too-slow", "unavailable", "internal")


def model_not_found(name: str, there_is: str) -> ApiError:
    """Build the 404 error for a model that is not here."""
    return ApiError(
        404, "not-found", f"the model {name[:100]!r} does not exist here; there is {there_is}", field="model"
    )


def answer_error(request: Request[Any, Any, Any], error: Exception) -> Response[bytes]:
    """Answer an exception in OpenAI's shape: an exception handler of Litestar's.

    The SDK sends a request again after 408, 409, 429 and 5xx; an answer that will not change says that this is vain.
    """
    found = with_names(to_api_error(error, request.app.state.outage.retry_after(error)), _NAMES)
    status = _STATUSES.get(found.kind, found.status)
    body = {
        "message": found.detail,
        "type": _type_of(status),
        "param": found.field or None,
        "code": _code_of(found),
    }
    final = {} if found.kind in _MAY_CHANGE else {"X-Should-Retry": "false"}
    return Response(
        msgspec.json.encode({"error": body}),
        status_code=status,
        media_type="application/json",
        headers={"Cache-Control": "no-store"} | final | found.headers,
    )


def _type_of(status: int) -> str:
    if status == 429:
        return "rate_limit_error"
    return "server_error" if status >= 500 else "invalid_request_error"


def _code_of(error: ApiError) -> str:
    if error.field == "model" and error.status == 404:
        return "model_not_found"
    return _CODES.get(error.kind) or error.kind.replace("-", "_")
