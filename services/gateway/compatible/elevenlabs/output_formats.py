"""Values of `output_format`, as ElevenLabs' API of music names them."""

from services.gateway.errors import ApiError
from shared.audio.forms import Form, plain

_MP3 = (
    *((22050, 32), (24000, 48)),
    *((44100, rate) for rate in (32, 64, 96, 128, 192)),
    *((48000, rate) for rate in (128, 192, 320)),  # not 240: MP3 has no such bit rate
)
_PCM = (8000, 16000, 22050, 24000, 32000, 44100, 48000)
_OPUS = (32, 64, 96, 128, 192)
OUTPUT_FORMATS: dict[str, Form] = {
    "auto": plain("mp3"),
    **{f"mp3_{rate}_{bits}": Form("mp3", rate, bits) for rate, bits in _MP3},
    **{f"pcm_{rate}": Form("pcm", rate) for rate in _PCM},
    "ulaw_8000": Form("ulaw", 8000, channels=1),
    "alaw_8000": Form("alaw", 8000, channels=1),
    **{f"opus_48000_{bits}": Form("opus", 48000, bits) for bits in _OPUS},
}


def output_format(name: str | None) -> Form:
    """The form of audio with a name; `auto` where none is given. Raises a 422 `ApiError`."""
    if (form := OUTPUT_FORMATS.get(name or "auto")) is None:
        known = ", ".join(OUTPUT_FORMATS)
        raise ApiError(422, "invalid-request", f"is to be one of {known}", field="output_format")
    return form
