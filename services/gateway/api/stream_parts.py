"""What a client asked for of a song's audio that may grow, and which part of it is sent."""

from dataclasses import dataclass

from services.gateway.api.audio_response import not_ready, requested_part
from services.gateway.api.conditional import Conditions, tag_of
from services.gateway.errors import ApiError
from shared.audio.forms import Form
from shared.schema.job import Job

# The last byte of a part whose end is not known: a "very large value" of RFC 8673; Firefox refuses 2^53 - 1. A range
# that a client ends as far out has no end either.
ENDLESS = 2**40 - 1


@dataclass(frozen=True)
class StreamPart:
    """What is sent of a stream: bytes from `first`, to `last` if that is known."""

    first: int
    last: int | None
    headers: dict[str, str]
    status: int


@dataclass(frozen=True)
class Wanted:
    """What a client wants to hear of a song."""

    job: Job
    form: Form
    start: float  # seconds
    asked: Conditions

    def is_file(self, job: Job) -> bool:
        """Whether a stored file has it all; `job` is the song's record by now. Of other forms there is none."""
        return job.status == "completed" and not self.start and self.form.audio_format is not None

    def tag(self, edition: str | None) -> str | None:
        """The entity tag: another one where decoding began again. None for audio that never grew."""
        return None if edition is None else tag_of(f"{edition} {self.form} {self.start}".encode())


def tagged(tag: str | None) -> dict[str, str]:
    """Headers with an entity tag, if there is one."""
    return {} if tag is None else {"ETag": tag}


def bounded_part(first: int, last: int, size: str, tag: str | None) -> StreamPart:
    """Bytes `first` to `last` of audio of `size` bytes, "*" while that is not known."""
    bounds = {"Content-Range": f"bytes {first}-{last}/{size}", "Content-Length": str(last - first + 1)}
    return StreamPart(first, last, tagged(tag) | bounds, 206)


def whole_part(size: int, wanted: Wanted, tag: str | None) -> StreamPart:
    """What is sent of audio that is all there. Raises `ApiError`."""
    if not size:
        raise beyond_end(wanted.job)
    part = requested_part(wanted.asked, size, tag)
    if part is None:
        return StreamPart(0, size - 1, tagged(tag) | {"Content-Length": str(size)}, 200)
    return bounded_part(part.first, part.last, str(size), tag)


def length_of(job: Job) -> float:
    """Seconds of a song, or the most that it may have while it is made."""
    return (job.request.max_duration_ms or 0) / 1000 if job.duration_s is None else job.duration_s


def beyond_end(job: Job) -> ApiError:
    """Build the 422 error for a stream that would begin behind the song's end."""
    may = "may have" if job.duration_s is None else "has"
    return ApiError(
        422, "invalid-request", f"from: the song {may} {length_of(job):g} seconds; begin before", field="from"
    )


def not_yet(job: Job) -> ApiError:
    """Build the 409 error for audio that did not come in time."""
    heard = f"; {job.playable_seconds:g} seconds of it can be heard" if job.playable_seconds else ""
    return not_ready(job, f"the song is {job.status}{heard}; ask again")
