"""Prompts and composition plans as what this service's model reads: lyrics with section marks, tags, and a length."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from services.gateway.compatible.elevenlabs.requests import Chunk, MusicRequest, Plan, Section
from shared.errors import InvalidRequest

LONGEST_MS = 600_000  # of a song
_MARK = re.compile(r"\[([^\[\]]+)\]")
_DIRECTION = re.compile(r"\{[^{}]*\}")
_MARKS = {"pre-chorus": "Prechorus", "pre chorus": "Prechorus", "prechorus": "Prechorus"}
_PLAN = "composition_plan"
_REFUSED = {
    "finetune_id": "there are no finetunes here; leave it out",
    "sign_with_c2pa": "songs are not signed here; leave it out",
    "with_timestamps": "when which word is sung is not known here; leave it out",
}
_NO_PARTS = (
    "parts of other songs cannot be used in a plan; to go on from a song, send continue_from to POST /generate instead"
)


@dataclass(frozen=True)
class Composition:
    """A song to be made."""

    lyrics: str
    tags: str
    length_ms: int | None  # the longest that it may be
    instrumental: bool
    notes: tuple[str, ...]  # what of the request is approximated or ignored: a field, a colon, and words

    def song(self, seed: int | None) -> dict[str, Any]:
        """The fields of a `GenerateRequest`."""
        given = {"max_duration_ms": self.length_ms, "seed": seed}
        return {"lyrics": self.lyrics, "tags": self.tags, "instrumental": self.instrumental} | {
            name: value for name, value in given.items() if value is not None
        }


def compose(request: MusicRequest) -> Composition:
    """What a request comes to. Raises `InvalidRequest` for what cannot be met."""
    for name, reason in _REFUSED.items():
        if getattr(request, name):
            raise InvalidRequest(name, reason)
    notes = []
    if request.model_id is not None:
        notes.append("model_id: ignored, for there is one model")
    if request.store_for_inpainting:
        notes.append("store_for_inpainting: ignored, for every song is kept for a week, and none is inpainted")
    if (request.prompt is None) == (request.composition_plan is None):
        raise InvalidRequest("prompt", "give either a prompt or a composition_plan")
    if request.composition_plan is None:
        return _from_prompt(request, notes)
    for name in ("music_length_ms", "lyrics_text"):
        if getattr(request, name) is not None:
            raise InvalidRequest(name, "goes with a prompt; a composition_plan says it in its sections")
    return _from_plan(request, request.composition_plan, notes)


def split_prompt(prompt: str) -> tuple[str, str]:
    """Divide a prompt into style and lyrics: those begin with the first line that is a section mark, as [Verse]."""
    lines = prompt.splitlines()
    first = next((number for number, line in enumerate(lines) if _MARK.fullmatch(line.strip())), len(lines))
    return "\n".join(lines[:first]), "\n".join(lines[first:])


def _from_prompt(request: MusicRequest, notes: list[str]) -> Composition:
    assert request.prompt is not None
    tags, text = split_prompt(request.prompt) if request.lyrics_text is None else (request.prompt, request.lyrics_text)
    if not request.prompt.strip() and not text.strip():
        raise InvalidRequest("prompt", "is blank; describe the music")
    notes.append("prompt: its style is read as tags, divided by commas and lines")
    if request.music_length_ms is not None:
        notes.append("music_length_ms: the longest that the song may be, which may end earlier")
    if request.respect_sections_durations is not None:
        notes.append("respect_sections_durations: ignored, for it goes with a composition_plan")
    lines = read_lines(text.splitlines(), notes)
    return _composition(request, lines, [tags], request.music_length_ms, notes)


def _from_plan(request: MusicRequest, plan: Plan, notes: list[str]) -> Composition:
    if (plan.sections is None) == (plan.chunks is None):
        raise InvalidRequest(_PLAN, "has either sections or chunks")
    if plan.chunks is None:
        lines, styles = _of_sections(plan, plan.sections or [], notes)
    else:
        lines, styles = _of_chunks(plan, plan.chunks, notes)
    length = sum(part.duration_ms or 0 for part in plan.sections or plan.chunks or [])
    if not 0 < length <= LONGEST_MS:
        name = "sections" if plan.chunks is None else "chunks"
        raise InvalidRequest(f"{_PLAN}.{name}", f"are to last from 3000 to {LONGEST_MS} ms together, not {length}")
    notes.append("duration_ms: their sum is the longest that the song may be, which the model divides")
    if request.respect_sections_durations:
        notes.append("respect_sections_durations: ignored, as said of duration_ms")
    return _composition(request, lines, styles, length, notes)


def _composition(
    request: MusicRequest, lines: list[str], styles: Iterable[str], length_ms: int | None, notes: list[str]
) -> Composition:
    has_words = any(not _MARK.fullmatch(line) for line in lines)
    if has_words and request.force_instrumental:
        raise InvalidRequest("force_instrumental", "the request has lines to sing; leave them out, or this field")
    if not has_words and not request.force_instrumental:
        notes.append("lyrics: there are none, and none are written here, so the song is instrumental")
    tags = ",".join(style for style in styles if style.strip())
    return Composition("\n".join(lines), tags, length_ms, not has_words, tuple(dict.fromkeys(notes)))


def _of_sections(plan: Plan, sections: list[Section], notes: list[str]) -> tuple[list[str], list[str]]:
    """Lines and styles of a plan for `music_v1`."""
    lines, styles = [], list(plan.positive_global_styles or [])
    if plan.negative_global_styles:
        notes.append("negative_global_styles: ignored, for the model knows none")
    for number, section in enumerate(sections):
        if section.source_from is not None:
            raise InvalidRequest(f"{_PLAN}.sections.{number}.source_from", _NO_PARTS)
        lines += [mark(section.section_name), *read_lines(section.lines, notes)]
        styles += section.positive_local_styles
        if section.positive_local_styles:
            notes.append("positive_local_styles: tags of the whole song")
        if section.negative_local_styles:
            notes.append("negative_local_styles: ignored, for the model knows none")
    return lines, styles


def _of_chunks(plan: Plan, chunks: list[Chunk], notes: list[str]) -> tuple[list[str], list[str]]:
    """Lines and styles of a plan for `music_v2`."""
    if plan.positive_global_styles is not None or plan.negative_global_styles is not None:
        raise InvalidRequest(_PLAN, "has either global styles and sections, or chunks, which have styles of their own")
    lines: list[str] = []
    styles: list[str] = []
    for number, chunk in enumerate(chunks):
        at = f"{_PLAN}.chunks.{number}"
        for name in ("song_id", "range", "conditioning_ref"):
            if getattr(chunk, name) is not None:
                raise InvalidRequest(f"{at}.{name}", _NO_PARTS)
        if chunk.text is None or chunk.duration_ms is None:
            raise InvalidRequest(f"{at}.{'text' if chunk.text is None else 'duration_ms'}", "is required")
        lines += read_lines(chunk.text.splitlines(), notes)
        styles += chunk.positive_styles
        if len(chunks) > 1 and chunk.positive_styles:
            notes.append("positive_styles: tags of the whole song")
        if chunk.negative_styles:
            notes.append("negative_styles: ignored, for the model knows none")
        given = (name for name in ("context_adherence", "condition_strength") if getattr(chunk, name) is not None)
        notes += [f"{name}: ignored, for the model has no such setting" for name in given]
    return lines, styles


def read_lines(lines: Iterable[str], notes: list[str]) -> list[str]:
    """Lines as the model reads them: none blank, marks as it knows them, directions in braces left out."""
    found = []
    for line in "\n".join(lines).splitlines():
        text = " ".join(_DIRECTION.sub(" ", line).split())
        if _DIRECTION.search(line):
            notes.append("directions in braces: left out, for the model would sing them")
        if text:
            found.append(mark(text) if _MARK.fullmatch(text) else text)
    return found


def mark(name: str) -> str:
    """The line that marks a section, by the section's name: without brackets and number, and in one line."""
    plain = " ".join(re.sub(r"[\[\]]", " ", name).split()) or "Section"
    plain = _without_number(plain) or plain
    return f"[{_MARKS.get(plain.lower(), plain)}]"


def _without_number(name: str) -> str:
    """The name of a section without its number, as in "Verse 2"."""
    # No regular expression: on a long line one that ends with "$" takes time by the square of the length.
    stem = name.rstrip("0123456789")
    return name if stem == name else stem.rstrip(" #:.-")


def sections_in(lines: Iterable[str]) -> list[tuple[str, list[str]]]:
    """Names and lines of the sections of lyrics whose marks are lines of their own; "Verse" where there is no mark."""
    found: list[tuple[str, list[str]]] = []
    for line in lines:
        if named := _MARK.fullmatch(line):
            found.append((named[1], []))
        else:
            if not found:
                found.append(("Verse", []))
            found[-1][1].append(line)
    return found
