"""The list of models as ElevenLabs' clients expect it."""

from typing import Any

from services.gateway.compatible.served_model import ServedModel


def list_models(model: ServedModel) -> list[dict[str, Any]]:
    """A bare list of all models."""
    return [
        {
            "model_id": model.name,
            "name": model.name,
            "description": "makes songs from lyrics and style tags",
            "can_be_finetuned": False,
            "can_do_text_to_speech": False,
            "can_do_voice_conversion": False,
            "languages": [],
        }
    ]
