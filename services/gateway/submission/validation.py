"""Validation: from the bytes of a body to a request that the model can fulfil.

Everything that a user can do wrong is put into words here.
"""

import asyncio
import re
import secrets
import time
from typing import Annotated, TypeVar

import msgspec
from msgspec import Meta

from services.gateway.auth.quota import too_many
from services.gateway.errors import ApiError
from services.gateway.submission.instrumental import check_no_words, text_of
from shared.errors import InvalidRequest
from shared.frames import frames_within, milliseconds_of
from shared.model.prompt import Prompt, Prompter
from shared.nats.streams import DAY
from shared.schema.request import (
    DEFAULT_DURATION_MS,
    DEFAULT_MIN_NEW_MS,
    MAX_BODY,
    MAX_DAYS_AHEAD,
    MAX_DURATION_MS,
    MAX_SEED,
    ContinueFrom,
    GenerateRequest,
)

_MEASURED_AT_ONCE = 4  # texts that wait to be measured, or are

_DIVIDES = re.compile("[,\uff0c\u3001\n\r\u2028\u2029]")  # commas, those of Chinese among them, and line breaks
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")  # and halves of surrogate pairs
_AT = re.compile(r" - at `\$(?:\.([\w.]+)(?:\[\d+\])?)?`$")
_NAMED = re.compile(r"(?:unknown|required) field `(.*)`", re.DOTALL)
_TIME = "a time with its zone, such as 2026-01-31T18:00:00Z or 2026-01-31T19:00:00+01:00"
_TYPES = {"int": "a whole number", "float": "a number", "str": "text", "bool": "true or false", "null": "null"} | {
    "array": "a list",
    "object": "an object",
}
_CHOICES = {
    "format": "flac, wav, mp3 or ogg",
    "priority": "high or normal",
    "webhook_events": "a list of ended and audio",
}
_UNITS = {"str": " characters", "array": " entries"}


class FitRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Lyrics and tags whose room is asked for. Both may be blank, as while they are being written."""

    lyrics: Annotated[str, Meta(max_length=60_000)]
    tags: Annotated[str, Meta(max_length=4_000)] = ""
    continue_from: Annotated[ContinueFrom, Meta(description="what the song is to begin with")] | None = None
    instrumental: Annotated[bool, Meta(description="a song without words")] = False


class FitBody(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The room that lyrics and tags leave for a song."""

    prompt_tokens: Annotated[int, Meta(description="positions of the model that the text takes")]
    longest_ms: Annotated[int, Meta(description="of the whole song; 0 where the text leaves no room")]
    kept_ms: Annotated[int, Meta(description="with continue_from: how much would be kept, in whole frames")] | None = (
        None
    )
    latest_at_ms: (
        Annotated[int, Meta(description="with continue_from: the latest at_ms that leaves room; 0 where none does")]
        | None
    ) = None


_request_decoder = msgspec.json.Decoder(GenerateRequest, strict=True)
_fit_decoder = msgspec.json.Decoder(FitRequest, strict=True)
_Body = TypeVar("_Body", GenerateRequest, FitRequest)


def decode_request(data: bytes) -> GenerateRequest:
    """Read the body of a request for songs.

    Raises `InvalidRequest` for wrong fields, `ApiError` where the body is no JSON or too large.
    """
    request = _decode(data, _request_decoder)
    check_text("title", request.title or "", "")
    if not (request.instrumental or request.lyrics.strip() or normalize_tags(request.tags)):
        raise InvalidRequest("lyrics", "give lyrics or tags; both are blank")
    if request.not_before is not None and request.not_before.timestamp() > time.time() + MAX_DAYS_AHEAD * DAY:
        words = f"is at most {MAX_DAYS_AHEAD} days ahead, because records are kept for a week; send it again later"
        raise InvalidRequest("not_before", words)
    if request.continue_from is None and request.min_new_ms != DEFAULT_MIN_NEW_MS:
        raise InvalidRequest("min_new_ms", "goes with continue_from alone; leave it out, or name a song to go on from")
    return request


def too_large() -> ApiError:
    """Make the 413 error for a body of more than `MAX_BODY` bytes."""
    return ApiError(413, "too-large", "the body may have at most 256 KiB")


def normalize_tags(tags: str) -> str:
    """Write tags as the model was trained on them: divided by a comma alone, none blank, none twice in any case.

    The model ignores a tag that begins with a space.
    """
    found: dict[str, str] = {}
    for tag in map(str.strip, _DIVIDES.split(tags)):
        if tag:
            found.setdefault(tag.lower(), tag)
    return ",".join(found.values())


def decode_fit(data: bytes) -> FitRequest:
    """Read the body of a question for room. Raises as `decode_request`."""
    return _decode(data, _fit_decoder)


def _decode(data: bytes, decoder: msgspec.json.Decoder[_Body]) -> _Body:
    if len(data) > MAX_BODY:
        raise too_large()
    if not data.strip():
        raise ApiError(400, "malformed-json", 'the body is empty; send an object such as {"lyrics": "la la la"}')
    try:
        request = decoder.decode(data)
    except msgspec.ValidationError as error:
        raise _in_words(str(error), decoder.type) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        what = "not UTF-8" if isinstance(error, UnicodeDecodeError) else str(error)
        raise ApiError(400, "malformed-json", f"{what}; the body must be one JSON object in UTF-8") from None
    check_text("lyrics", request.lyrics, "\n\r\t")
    check_text("tags", request.tags, "\n\r\t")
    if request.instrumental:
        check_no_words(request.lyrics)
    _check_origin(request.continue_from)
    return request


def _in_words(message: str, kind: type[msgspec.Struct]) -> InvalidRequest:
    """Turn msgspec's message about a body of this kind into words for a user."""
    at = _AT.search(message)
    field = at[1] or "" if at else ""
    message = _AT.sub("", message)
    if named := _NAMED.search(message):
        if "required" in message:
            return InvalidRequest(named[1], "is required")
        known = ", ".join((ContinueFrom if field else kind).__struct_fields__)
        name = named[1][:100]
        return InvalidRequest(f"{field}.{name}" if field else name, f"is not a field; there are {known}")
    return InvalidRequest(field, plain_words(message, field))


def plain_words(message: str, field: str) -> str:
    """What msgspec says about a field, without its place, in words for a user."""
    if "RFC3339" in message or "timezone component" in message or message.startswith("Expected `datetime"):
        return f"must be {_TIME}"
    if wrong := re.fullmatch(r"Expected `([\w |]+)`, got `(\w+)`", message):
        wanted = " or ".join(_TYPES.get(name, name) for name in wrong[1].split(" | "))
        return f"must be {wanted}, not {_TYPES.get(wrong[2], wrong[2])}"
    if limit := re.fullmatch(r"Expected `([\w |]+)` (of length )?([<>]=) ([\d.]+)", message):
        bound = "at most" if limit[3] == "<=" else "at least"
        unit = _UNITS[limit[1].partition(" | ")[0]] if limit[2] else ""
        return f"must {'have' if limit[2] else 'be'} {bound} {limit[4]}{unit}"
    if choice := re.fullmatch(r"Invalid enum value (.*)", message):
        return f"must be {_CHOICES.get(field, 'another value')}, not {choice[1][:100]}"
    return message


def _check_origin(asked: ContinueFrom | None) -> None:
    if asked is not None and (asked.job_id is None) == (asked.recording_id is None):
        raise InvalidRequest("continue_from", "names either a song, as job_id, or a recording, as recording_id")


def check_text(field: str, text: str, allowed: str) -> None:
    """Raise `InvalidRequest` for control characters that are not `allowed`."""
    for found in _CONTROL.finditer(text):
        if found[0] not in allowed:
            raise InvalidRequest(
                field, f"holds the control character U+{ord(found[0]):04X} at position {found.start()}; leave it out"
            )


class ModelLimits:
    """The limits that the model sets: its vocabulary, and its positions, which prompt and frames share.

    One text is tokenized at a time for all clients together: the longest take a core for a tenth of a second and more.
    """

    def __init__(self, prompter: Prompter) -> None:
        self._prompter = prompter
        self._free = asyncio.Semaphore(1)
        self._measuring = 0  # texts that wait to be measured, or are

    async def complete(self, request: GenerateRequest, most_ms: int | None = None, kept: int = 0) -> GenerateRequest:
        """Write tags and lyrics as the model reads them, and fill in `seed` and `max_duration_ms` (at most `most_ms`).

        The song begins with so many `kept` frames of another one. Raises `InvalidRequest` when the model cannot fulfil
        the request.
        """
        tags, lyrics = _as_read(request)
        request = msgspec.structs.replace(request, tags=tags, lyrics=lyrics)
        longest = self._prompter.longest_ms(await self._encode(request.tags, request.lyrics))
        if frames_within(longest) < 1:
            tokens = 1 - frames_within(longest)
            raise InvalidRequest("lyrics", f"{tokens} tokens too long: not even one frame fits beside lyrics and tags")
        wanted = request.max_duration_ms
        if wanted is not None and frames_within(wanted) > frames_within(longest):
            raise InvalidRequest(
                "max_duration_ms",
                f"at most {longest} ms fit beside these lyrics and tags; ask for less or shorten them",
            )
        if kept:
            _check_room(kept, longest, most_ms, wanted)
        usual = min(milliseconds_of(kept) + DEFAULT_DURATION_MS, longest, most_ms or longest, MAX_DURATION_MS)
        return msgspec.structs.replace(
            request,
            max_duration_ms=usual if wanted is None else wanted,
            seed=secrets.randbelow(MAX_SEED + 1) if request.seed is None else request.seed,
        )

    async def measure(
        self, text: FitRequest, most_ms: int | None = None, kept: int | None = None, of_frames: int = 0
    ) -> FitBody:
        """Measure how much room a text leaves, up to `most_ms`, for a song that keeps `kept` of another's `of_frames`.

        Raises `InvalidRequest` for characters that the model does not know, and a 429 `ApiError` when several texts
        wait already, so that songs do not wait for many of them.
        """
        if self._measuring >= _MEASURED_AT_ONCE:
            raise too_many("other texts are being measured", 1)
        self._measuring += 1
        try:
            prompt = await self._encode(*_as_read(text))
        finally:
            self._measuring -= 1
        longest = self._prompter.longest_ms(prompt)
        longest = max(0, min(longest, most_ms or longest))
        if kept is None:
            return FitBody(prompt_tokens=prompt.length, longest_ms=longest)
        return FitBody(
            prompt_tokens=prompt.length,
            longest_ms=longest,
            kept_ms=milliseconds_of(kept),
            latest_at_ms=milliseconds_of(min(of_frames, _most_kept(longest))),
        )

    async def prompt_tokens(self, request: GenerateRequest) -> int:
        """Positions of the model that the text of an accepted request takes."""
        return (await self._encode(request.tags, request.lyrics)).length

    async def _encode(self, tags: str, lyrics: str) -> Prompt:
        async with self._free:
            return await asyncio.to_thread(self._prompter.encode, tags, lyrics)


def _as_read(request: GenerateRequest | FitRequest) -> tuple[str, str]:
    """Tags and lyrics as the model reads them."""
    tags = normalize_tags(request.tags)
    return text_of(tags, request.lyrics) if request.instrumental else (tags, request.lyrics)


def _most_kept(longest_ms: int) -> int:
    """The most frames that a song of at most `longest_ms` can keep of another one: a frame of it has to be new."""
    return max(0, frames_within(longest_ms) - 1)


def _check_room(kept: int, longest_ms: int, most_ms: int | None, wanted_ms: int | None) -> None:
    """Raise `InvalidRequest` where a song that keeps `kept` frames of another one has no room for a new one.

    `longest_ms` fit beside the prompt, `most_ms` are allowed, and `wanted_ms` are asked for.
    """
    field, keep = "continue_from.at_ms", "keep {} ms at most"
    if kept > (most := _most_kept(longest_ms)):
        words = f"nothing new fits beside these lyrics and tags after {milliseconds_of(kept)} ms"
        if not most:
            raise InvalidRequest("lyrics", f"{words}, nor after any other moment: shorten them")
        raise InvalidRequest(field, f"{words}: {keep.format(milliseconds_of(most))}, or shorten them")
    if most_ms is not None and kept > (most := _most_kept(most_ms)):
        raise InvalidRequest(field, f"this key allows at most {most_ms} ms: {keep.format(milliseconds_of(most))}")
    if wanted_ms is not None and kept > (most := _most_kept(wanted_ms)):
        more = f"ask for {milliseconds_of(kept + 1)} ms at least"
        or_less = f", or {keep.format(milliseconds_of(most))}" if most else ""
        raise InvalidRequest(
            "max_duration_ms",
            f"is the length of the whole song, and {milliseconds_of(kept)} ms of it are kept: {more}{or_less}",
        )
