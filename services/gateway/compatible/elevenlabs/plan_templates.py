"""Composition plans made by rule from a prompt. They hold the lines of the prompt, or none: no lyrics are written."""

from itertools import accumulate, pairwise
from typing import Any

from services.gateway.compatible.elevenlabs.plans import read_lines, sections_in, split_prompt
from services.gateway.compatible.elevenlabs.requests import PlanRequest
from services.gateway.submission.validation import normalize_tags
from shared.errors import InvalidRequest
from shared.schema.request import DEFAULT_DURATION_MS

_SHORTEST_MS, _LONGEST_MS = 3_000, 120_000  # of a section
_USUAL_MS = 20_000  # of a section
# Names of sections, by their number.
_FORMS = (
    "Verse",
    "Verse Chorus",
    "Verse Chorus Outro",
    "Intro Verse Chorus Outro",
    "Intro Verse Chorus Verse Chorus",
    "Intro Verse Chorus Verse Chorus Outro",
    "Intro Verse Chorus Verse Chorus Bridge Chorus",
    "Intro Verse Chorus Verse Chorus Bridge Chorus Outro",
)
_WEIGHTS = {"Intro": 1, "Outro": 1, "Bridge": 2}  # of a section's length; others have 3
NOTES = (
    "lines: those of the prompt after its first section mark, or none, for no lyrics are written here: fill them in",
    "sections: a template by length",
)

_Named = tuple[str, list[str]]  # a section's name and its lines


def write_plan(request: PlanRequest) -> dict[str, Any]:
    """A plan for a prompt, in sections, or in chunks where `model_id` is `music_v2` or begins with it.

    Raises `InvalidRequest`.
    """
    if request.source_composition_plan is not None:
        raise InvalidRequest("source_composition_plan", "plans are not rewritten here; change its fields, and send it")
    if not request.prompt.strip():
        raise InvalidRequest("prompt", "is blank; describe the music")
    length = request.music_length_ms or DEFAULT_DURATION_MS
    style, text = split_prompt(request.prompt)
    named = sections_in(read_lines(text.splitlines(), []))
    if length < (least := len(named) * _SHORTEST_MS):
        raise InvalidRequest("music_length_ms", f"is to be at least {least} for the prompt's {len(named)} sections")
    styles = [tag for tag in normalize_tags(style).split(",") if tag]
    in_shape = _in_chunks if (request.model_id or "").startswith("music_v2") else _in_sections
    return in_shape(styles, named or _template(length), length)


def plan_of_song(tags: str, lyrics: str, length_ms: int) -> dict[str, Any]:
    """The plan, in sections, that describes a song of this length."""
    return _in_sections([tag for tag in tags.split(",") if tag], sections_in(lyrics.splitlines()), length_ms)


def _template(length_ms: int) -> list[_Named]:
    number = min(max(round(length_ms / _USUAL_MS), 1), len(_FORMS))
    return [(name, []) for name in _FORMS[number - 1].split()]


def _in_sections(styles: list[str], named: list[_Named], length_ms: int) -> dict[str, Any]:
    named = _enough(named, length_ms)
    return {
        "positive_global_styles": styles,
        "negative_global_styles": [],
        "sections": [
            {
                "section_name": name,
                "positive_local_styles": [],
                "negative_local_styles": [],
                "duration_ms": duration,
                "lines": lines,
            }
            for (name, lines), duration in zip(named, _durations(named, length_ms), strict=True)
        ],
    }


def _in_chunks(styles: list[str], named: list[_Named], length_ms: int) -> dict[str, Any]:
    named = _enough(named, length_ms)
    return {
        "chunks": [
            {
                "text": "\n".join([f"[{name}]", *lines]),
                "duration_ms": duration,
                "positive_styles": styles,
                "negative_styles": [],
            }
            for (name, lines), duration in zip(named, _durations(named, length_ms), strict=True)
        ]
    }


def _enough(named: list[_Named], length_ms: int) -> list[_Named]:
    """The sections, and as many without lines as it takes for none to be longer than a section may be."""
    missing = max(-(-length_ms // _LONGEST_MS), 1) - len(named)
    return named + [("Instrumental", [])] * max(missing, 0)


def _durations(named: list[_Named], length_ms: int) -> list[int]:
    """Milliseconds of each section, which add up to the length."""
    found = _divided(length_ms, [_WEIGHTS.get(name, 3) for name, _ in named])
    if min(found) >= _SHORTEST_MS and max(found) <= _LONGEST_MS:
        return found
    return _divided(length_ms, [1] * len(named))


def _divided(whole: int, weights: list[int]) -> list[int]:
    ends = [whole * part // sum(weights) for part in accumulate(weights)]
    return [end - begin for begin, end in pairwise([0, *ends])]
