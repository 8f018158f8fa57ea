"""Errors under /v1, where no route is as well: each kind of client gets its vendor's shape."""

from typing import Any

from litestar import Request, Response

from services.gateway.auth.authenticate import ELEVENLABS_HEADER
from services.gateway.compatible.elevenlabs import errors as elevenlabs
from services.gateway.compatible.openai import errors as openai

PREFIX = "/v1/"
_MUSIC, _SPEECH = "/v1/music", "/v1/audio/"  # addresses of one vendor, however the key is sent


def answer_error(request: Request[Any, Any, Any], error: Exception) -> Response[bytes]:
    """Answer an exception for an address under `PREFIX`: an exception handler of Litestar's."""
    path = request.scope["path"]
    is_music = path.startswith(_MUSIC) or (ELEVENLABS_HEADER in request.headers and not path.startswith(_SPEECH))
    return elevenlabs.answer_error(request, error) if is_music else openai.answer_error(request, error)
