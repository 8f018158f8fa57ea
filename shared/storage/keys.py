"""The keys of all objects.

Keys carry the fencing token of the turn that wrote them, so that a worker which lost its lease writes elsewhere:

- ``tokens/<job>/<fencing token>.safetensors``; beside it, of a song that goes on from another one,
  ``kept.safetensors``: what it begins with
- ``audio/<job>/<fencing token>.<format>``; beside it, with the same fencing token, its renditions: other formats and
  ``audio/<job>/<fencing token>.peaks.json``
- while a song is made, ``audio/<job>/<fencing token>.<window>.part``: its FLAC stream, a piece a window; beside the
  last of them ``….state``, from which decoding goes on, and ``….peaks.json``
- ``recordings/<tenant>/<SHA-256 of the upload>/audio.flac``; beside it its renditions, and its tokens under a name that
  says which encoder made them, ending in ``.part`` while more of them are to come
"""

import hashlib
import re
from typing import get_args

from shared.schema.job import Job
from shared.schema.request import AudioFormat


def tokens_key(job_id: str, fencing_token: int) -> str:
    """The key of a song's tokens."""
    return f"tokens/{job_id}/{fencing_token}.safetensors"


def kept_tokens_key(job_id: str) -> str:
    """The key of the tokens that a song took over from the one that it goes on from."""
    return f"tokens/{job_id}/kept.safetensors"


def prefixes(job: Job) -> tuple[str, ...]:
    """The prefixes of all objects of a song, its tokens and its audio, or of a recording."""
    if job.recording is not None:
        return (recording_prefix(job.tenant, job.recording.sha256),)
    return song_prefixes(job.job_id)


def song_prefixes(job_id: str) -> tuple[str, str]:
    """The two prefixes of all objects of a song: its tokens and its audio."""
    return f"tokens/{job_id}/", f"audio/{job_id}/"


def recording_prefix(tenant: str, sha256: str) -> str:
    """The prefix of all objects of a recording."""
    return f"recordings/{tenant}/{sha256}/"


def recording_key(tenant: str, sha256: str) -> str:
    """The key of a recording's audio, FLAC."""
    return f"{recording_prefix(tenant, sha256)}audio.flac"


def recording_tokens_key(tenant: str, sha256: str, identity: str) -> str:
    """The key of a recording's tokens as an encoder of this identity makes them."""
    return f"{recording_prefix(tenant, sha256)}{hashlib.sha256(identity.encode()).hexdigest()[:16]}.safetensors"


def recording_part_key(tokens: str) -> str:
    """The key of the first of a recording's tokens, while more of them are to come."""
    return f"{tokens.removesuffix('.safetensors')}.part"


def audio_key(job_id: str, fencing_token: int, suffix: str) -> str:
    """The key of a song's audio."""
    return f"audio/{job_id}/{fencing_token}.{suffix}"


def part_key(job_id: str, fencing_token: int, window: int) -> str:
    """The key of the piece of a song's FLAC stream that a window made final."""
    return f"audio/{job_id}/{fencing_token}.{window}.part"


def state_key(part: str) -> str:
    """The key of the state of decoding after a part."""
    return f"{part.removesuffix('.part')}.state"


def part_peaks_key(part: str) -> str:
    """The key of the peaks of a song up to the end of a part."""
    return f"{part.removesuffix('.part')}.peaks.json"


def is_of_stream(key: str) -> bool:
    """Whether an object is a part of a song's stream, or lies beside one: it has no use once the song has ended."""
    return re.fullmatch(r"audio/[^/]+/\d+\.\d+\.(part|state|peaks\.json)", key) is not None


def converted_key(audio: str, suffix: AudioFormat) -> str:
    """The key of the same audio in another format."""
    return f"{audio.rpartition('.')[0]}.{suffix}"


def peaks_key(audio: str) -> str:
    """The key of the audio's peaks."""
    return f"{audio.rpartition('.')[0]}.peaks.json"


def keys_with_renditions(audio: str) -> set[str]:
    """The key of a song's audio and those that its renditions may have."""
    return {audio, peaks_key(audio), *(converted_key(audio, suffix) for suffix in get_args(AudioFormat))}
