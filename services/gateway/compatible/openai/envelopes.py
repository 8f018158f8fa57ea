"""How songs are sent to OpenAI's clients: bare, or as server-sent events."""

import base64

import msgspec

from services.gateway.compatible.served_model import ServedModel
from services.gateway.compatible.song_answer import Envelope
from services.gateway.submission.validation import ModelLimits
from shared.audio.forms import Form
from shared.schema.job import Job

_PIECE = 24 * 1024  # bytes of audio in an event


class AudioEnvelope(Envelope):
    """The bare audio. Headers name the song, as the request's id, and the model that made it."""

    def __init__(self, model: ServedModel) -> None:
        self._model = model

    def headers(self, job: Job, form: Form) -> dict[str, str]:
        """See `Envelope.headers`."""
        return super().headers(job, form) | {"OpenAI-Model": self._model.name}


class EventEnvelope(AudioEnvelope):
    """Events with audio in base64, and one at the end that says what it took."""

    def __init__(self, model: ServedModel, limits: ModelLimits) -> None:
        super().__init__(model)
        self._limits = limits

    def headers(self, job: Job, form: Form) -> dict[str, str]:
        """See `Envelope.headers`."""
        return super().headers(job, form) | {"Content-Type": "text/event-stream; charset=utf-8"}

    def block(self, audio: bytes) -> bytes:
        """A piece of the audio as `speech.audio.delta` events."""
        pieces = (audio[at : at + _PIECE] for at in range(0, len(audio), _PIECE))
        return b"".join(
            _event({"type": "speech.audio.delta", "audio": base64.b64encode(piece).decode()}) for piece in pieces
        )

    async def tail(self, job: Job) -> bytes:
        """The event `speech.audio.done`: tokens of the text, and frames of the song, which are 80 ms each."""
        text, frames = await self._limits.prompt_tokens(job.request), job.frames or 0
        usage = {"input_tokens": text, "output_tokens": frames, "total_tokens": text + frames}
        return _event({"type": "speech.audio.done", "usage": usage})


def _event(data: dict[str, object]) -> bytes:
    return b"data: " + msgspec.json.encode(data) + b"\n\n"
