"""All routes under /v1."""

from services.gateway.compatible import models
from services.gateway.compatible.elevenlabs import routes as elevenlabs
from services.gateway.compatible.openai import routes as openai

ROUTES = (*models.ROUTES, *openai.ROUTES, *elevenlabs.ROUTES)
