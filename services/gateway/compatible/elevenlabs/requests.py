"""Bodies of requests as clients of ElevenLabs' API of music send them; a field that is not here is refused in words."""

import re
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta

from services.gateway.errors import ApiError
from services.gateway.submission.validation import plain_words
from shared.errors import InvalidRequest
from shared.schema.request import MAX_BODY, MAX_SEED

LENGTH_MS = Meta(ge=3_000, le=600_000)  # of a song
_SECTION_MS = Meta(ge=3_000, le=120_000)
_SHORT = Meta(max_length=100)
_AT = re.compile(r" - at `\$\.?([\w.\[\]]*)`$")  # a name that was sent may hold more
_NAMED = re.compile(r"Object (?:contains unknown|missing required) field `(.*)`", re.DOTALL)


class Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A section of a plan for `music_v1`."""

    section_name: Annotated[str, Meta(min_length=1, max_length=100)]
    positive_local_styles: list[str] = []
    negative_local_styles: list[str] = []
    duration_ms: Annotated[int, _SECTION_MS]
    lines: list[str] = []
    source_from: Any = None


class Chunk(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A chunk of a plan for `music_v2`: one to be made, or, with `song_id` and `range`, a part of another song."""

    text: str | None = None
    duration_ms: Annotated[int, _SECTION_MS] | None = None
    positive_styles: list[str] = []
    negative_styles: list[str] | None = None
    context_adherence: Annotated[str, _SHORT] | None = None
    conditioning_ref: Any = None
    condition_strength: Annotated[str, _SHORT] | None = None
    song_id: Any = None
    range: Any = None


class Plan(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A composition plan in either shape: global styles and sections, or chunks."""

    positive_global_styles: list[str] | None = None
    negative_global_styles: list[str] | None = None
    sections: Annotated[list[Section], Meta(max_length=200)] | None = None
    chunks: Annotated[list[Chunk], Meta(max_length=200)] | None = None


class MusicRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A request for a song. Null is as good as absent everywhere."""

    prompt: Annotated[str, Meta(max_length=4_100)] | None = None
    lyrics_text: str | None = None
    composition_plan: Plan | None = None
    music_length_ms: Annotated[int, LENGTH_MS] | None = None
    model_id: Annotated[str, _SHORT] | None = None
    seed: Annotated[int, Meta(ge=0, le=MAX_SEED)] | None = None
    force_instrumental: bool | None = None
    finetune_id: Annotated[str, _SHORT] | None = None
    respect_sections_durations: bool | None = None
    store_for_inpainting: bool | None = None
    sign_with_c2pa: bool | None = None
    with_timestamps: bool | None = None
    with_waveform_visual: bool | None = None


class PlanRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A request for a composition plan."""

    prompt: Annotated[str, Meta(max_length=4_100)]
    music_length_ms: Annotated[int, LENGTH_MS] | None = None
    source_composition_plan: Any = None
    model_id: Annotated[str, _SHORT] | None = None


_Body = TypeVar("_Body", MusicRequest, PlanRequest)


def decode(data: bytes, kind: type[_Body]) -> _Body:
    """Read a body.

    Raises `InvalidRequest` for wrong fields, named as in `composition_plan.sections.0.lines`, and a 400 or 413
    `ApiError` where the body is no JSON or too large.
    """
    if len(data) > MAX_BODY:
        raise ApiError(413, "too-large", "the body may have at most 256 KiB")
    try:
        return msgspec.json.decode(data, type=kind)
    except msgspec.ValidationError as error:
        raise _in_words(str(error), kind) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        what = "not UTF-8" if isinstance(error, UnicodeDecodeError) else str(error)
        raise ApiError(400, "malformed-json", f"{what}; the body must be one JSON object in UTF-8") from None


def _in_words(message: str, kind: type[msgspec.Struct]) -> InvalidRequest:
    """Turn msgspec's message into words for a user, with the path of the field."""
    at = _AT.search(message)
    path = re.findall(r"\w+", at[1]) if at else []
    message = _AT.sub("", message)
    if named := _NAMED.fullmatch(message):
        field = ".".join([*path, named[1][:100]])
        if "required" in message:
            return InvalidRequest(field, "is required")
        owner = {"sections": Section, "chunks": Chunk}.get(next(iter(path[1:]), ""), Plan if path else kind)
        return InvalidRequest(field, f"is not known here; there are {', '.join(owner.__struct_fields__)}")
    return InvalidRequest(".".join(path), plain_words(message, path[-1] if path else ""))
