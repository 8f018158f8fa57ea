"""The list of models, which several vendors' clients ask for at one address: each is answered in its own shape."""

from typing import Any

from litestar import Request, Response, get
from litestar.di import NamedDependency

from services.gateway.api.responses import NO_STORE
from services.gateway.auth.authenticate import ELEVENLABS_HEADER
from services.gateway.compatible.elevenlabs import models as elevenlabs
from services.gateway.compatible.openai import models as openai
from services.gateway.compatible.served_model import ServedModel


@get("/v1/models", include_in_schema=False)
async def models(request: Request[Any, Any, Any], served_model: NamedDependency[ServedModel]) -> Response[Any]:
    """The models: a bare list for ElevenLabs' clients, which send their key in a header of its own, else OpenAI's."""
    vendor = elevenlabs if ELEVENLABS_HEADER in request.headers else openai
    return Response(vendor.list_models(served_model), headers=NO_STORE)


ROUTES = (models,)
