"""How songs are sent to ElevenLabs' clients: bare, or as the second part of a multipart response."""

import math
from itertools import pairwise
from typing import Any

import msgspec

from services.gateway.api.audio_response import AudioResponses
from services.gateway.compatible.elevenlabs.plan_templates import plan_of_song
from services.gateway.compatible.elevenlabs.requests import MusicRequest
from services.gateway.compatible.song_answer import Envelope
from shared.audio.forms import Form
from shared.audio.peaks import PeaksBody
from shared.schema.job import Job

NOTES_HEADER = "HeartMuLa-Notes"  # what of a request is approximated or ignored
_VALUES_A_SECOND, _LOUDEST = 4, 1000  # of a waveform


class AudioEnvelope(Envelope):
    """The bare audio. Headers name the song, and what of the request is approximated or ignored."""

    def __init__(self, notes: tuple[str, ...]) -> None:
        self._notes = notes

    def headers(self, job: Job, form: Form) -> dict[str, str]:
        """See `Envelope.headers`."""
        return super().headers(job, form) | {"song-id": job.job_id, NOTES_HEADER: "; ".join(self._notes)}


class DetailedEnvelope(AudioEnvelope):
    """JSON in one line, then the audio, as parts of a multipart response.

    The SDK takes all after the second part's headers for audio, the closing boundary too. That has 44 bytes with its
    line breaks, a whole number of stereo samples, so that PCM can be read all the same.
    """

    def __init__(self, notes: tuple[str, ...], request: MusicRequest, form: Form, audio: AudioResponses) -> None:
        super().__init__(notes)
        self._request, self._form, self._audio = request, form, audio

    def headers(self, job: Job, form: Form) -> dict[str, str]:
        """See `Envelope.headers`."""
        return super().headers(job, form) | {"Content-Type": f"multipart/mixed; boundary={job.job_id}"}

    async def head(self, job: Job) -> bytes:
        """The first part, and the headers of the second one."""
        name = f"{job.job_id}.{self._form.suffix}"
        lines = [
            f"--{job.job_id}",
            "Content-Type: application/json",
            "",
            msgspec.json.encode(await self._details(job)).decode(),
            f"--{job.job_id}",
            f"Content-Type: {self._form.content_type}",
            f'Content-Disposition: attachment; filename="{name}"',
            "",
            "",
        ]
        return "\r\n".join(lines).encode()

    async def tail(self, job: Job) -> bytes:
        """The closing boundary."""
        return f"\r\n--{job.job_id}--\r\n".encode()

    async def _details(self, job: Job) -> dict[str, Any]:
        """What is known of a song; what is not is null or empty."""
        given, song = self._request.composition_plan, job.request
        length_ms = round(1000 * (job.duration_s or 0))
        plan = plan_of_song(song.tags, song.lyrics, length_ms) if given is None else _without_null(given)
        about: dict[str, Any] = {
            "title": song.title,
            "description": self._request.prompt,
            "genres": [],
            "languages": [],
            "is_explicit": None,
        }
        found = {"composition_plan": plan, "song_metadata": about, "notes": self._notes}
        if self._request.with_waveform_visual:
            found["waveform_visual"] = waveform_visual(await self._audio.waveform(job), job.duration_s or 0)
        return found


def waveform_visual(peaks: PeaksBody, seconds: float) -> list[int]:
    """The sample that is furthest from zero of each quarter of a second, -1000 to 1000."""
    points = peaks.sample_rate / peaks.samples_per_pixel / _VALUES_A_SECOND
    starts = [math.floor(number * points) for number in range(math.ceil(seconds * _VALUES_A_SECOND) + 1)]
    stretches = (peaks.data[2 * first : 2 * max(last, first + 1)] for first, last in pairwise(starts))
    return [round(max(stretch, key=abs) * _LOUDEST / 127) for stretch in stretches if stretch]


def _without_null(value: Any) -> Any:
    """A structure as JSON values, without the fields that are null."""
    match value:
        case msgspec.Struct():
            return _without_null(msgspec.structs.asdict(value))
        case dict():
            return {name: _without_null(found) for name, found in value.items() if found is not None}
        case list():
            return [_without_null(found) for found in value]
    return value
