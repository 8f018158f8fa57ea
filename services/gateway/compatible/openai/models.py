"""Models as OpenAI's clients expect them."""

from typing import Any

from services.gateway.compatible.served_model import ServedModel


def describe_model(model: ServedModel) -> dict[str, Any]:
    """A model."""
    return {"id": model.name, "object": "model", "created": model.created, "owned_by": "heartmula"}


def list_models(model: ServedModel) -> dict[str, Any]:
    """A list of all models."""
    return {"object": "list", "data": [describe_model(model)]}
