"""Prompts and plans of ElevenLabs' clients as lyrics, tags and a length, and plans that are made by rule."""

import json
from typing import Any

import pytest

from services.gateway.compatible.elevenlabs.output_formats import OUTPUT_FORMATS, output_format
from services.gateway.compatible.elevenlabs.plan_templates import plan_of_song, write_plan
from services.gateway.compatible.elevenlabs.plans import Composition, compose
from services.gateway.compatible.elevenlabs.requests import MusicRequest, PlanRequest, decode
from services.gateway.errors import ApiError
from services.gateway.submission.validation import normalize_tags
from shared.errors import InvalidRequest


def section(name: str, *lines: str, **more: Any) -> dict[str, Any]:
    return {"section_name": name, "lines": lines, "duration_ms": 10_000} | more


def composed(**body: Any) -> Composition:
    return compose(decode(json.dumps(body).encode(), MusicRequest))


def refused(**body: Any) -> str:
    with pytest.raises(InvalidRequest) as caught:
        composed(**body)
    return str(caught.value)


def noted(song: Composition) -> set[str]:
    """The fields that the notes are about."""
    return {note.partition(":")[0] for note in song.notes}


def planned(**body: Any) -> dict[str, Any]:
    return write_plan(decode(json.dumps(body).encode(), PlanRequest))


def test_a_bare_prompt_is_tags_of_an_instrumental_song() -> None:
    song = composed(prompt="lo-fi, warm piano\nslow", music_length_ms=30_000)
    assert song.song(7) == {
        "lyrics": "",
        "tags": "lo-fi, warm piano\nslow",
        "max_duration_ms": 30_000,
        "seed": 7,
        "instrumental": True,
    }
    assert noted(song) == {"prompt", "music_length_ms", "lyrics"}
    assert "lyrics" not in noted(composed(prompt="lo-fi", force_instrumental=True)), "that was asked for"


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": "pop, piano\n[Verse 1]\nHello world\n\n[Pre-Chorus]\n La la "},
        {"prompt": "pop, piano", "lyrics_text": "[verse 1]\nHello world\n[PRE CHORUS]\nLa la"},
    ],
    ids=["in the prompt", "in lyrics_text"],
)
def test_lyrics_beside_a_prompt_are_sung(body: dict[str, Any]) -> None:
    song = composed(**body)
    assert song.lyrics.lower() == "[verse]\nhello world\n[prechorus]\nla la"
    assert (normalize_tags(song.tags), song.instrumental, song.length_ms) == ("pop,piano", False, None)
    assert "force_instrumental" in refused(**body, force_instrumental=True)


def test_sections_become_lyrics_with_marks_tags_and_a_length() -> None:
    song = composed(
        composition_plan={
            "positive_global_styles": ["pop", "piano, soft"],
            "negative_global_styles": ["metal"],
            "sections": [
                section("Intro", duration_ms=3_000),
                section("Verse 1", "Hello {whispered} world", "{scratching}", positive_local_styles=["calm", "pop"]),
                section("[Chorus]\nII", "La la\nla", negative_local_styles=["drums"], source_from=None),
            ],
        },
        respect_sections_durations=True,
    )
    assert song.lyrics == "[Intro]\n[Verse]\nHello world\n[Chorus II]\nLa la\nla"
    assert normalize_tags(song.tags) == "pop,piano,soft,calm"
    assert (song.length_ms, song.instrumental) == (23_000, False)
    assert noted(song) == {
        "negative_global_styles",
        "positive_local_styles",
        "negative_local_styles",
        "directions in braces",
        "duration_ms",
        "respect_sections_durations",
    }


def test_chunks_become_lyrics_with_marks_tags_and_a_length() -> None:
    chunks = [
        {"text": "[Verse 2]\nHello {loud}\nworld", "duration_ms": 4_000, "positive_styles": ["rock", "fast"]},
        {"text": "la la", "duration_ms": 5_000, "positive_styles": ["rock"], "context_adherence": "low"},
    ]
    song = composed(composition_plan={"chunks": chunks})
    assert song.lyrics == "[Verse]\nHello\nworld\nla la"
    assert (normalize_tags(song.tags), song.length_ms) == ("rock,fast", 9_000)
    assert noted(song) == {"directions in braces", "positive_styles", "context_adherence", "duration_ms"}


def test_long_lines_and_names_of_fields_hold_nothing_up() -> None:
    """Bodies are read between the answers to all others: these would take minutes if they took time by the square."""
    dashes, digits = "-" * 50_000, "1" * 50_000
    song = composed(prompt="pop", lyrics_text=f"[{dashes}x]\n[{digits}x]\n[Verse{dashes}{digits}]")
    assert song.lyrics == f"[{dashes}x]\n[{digits}x]\n[Verse]"
    assert "is not known here" in refused(**{" - at `$" * 30_000 + "\n": 1})


def test_a_plan_without_lines_is_instrumental_and_says_so() -> None:
    song = composed(composition_plan={"sections": [section("Intro"), section("Guitar solo"), section("[ ]")]})
    assert (song.lyrics, song.instrumental) == ("[Intro]\n[Guitar solo]\n[Section]", True)
    assert "lyrics" in noted(song)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({}, "prompt: give either a prompt or a composition_plan"),
        ({"prompt": "a", "composition_plan": {"chunks": []}}, "prompt: give either"),
        ({"prompt": " \n"}, "prompt: is blank"),
        ({"prompt": "a", "music_length_ms": 2_999}, "music_length_ms: must be at least 3000"),
        ({"prompt": "a", "music_length_ms": 600_001}, "music_length_ms: must be at most 600000"),
        ({"prompt": "a", "finetune_id": "f"}, "finetune_id: there are no finetunes"),
        ({"prompt": "a", "sign_with_c2pa": True}, "sign_with_c2pa: songs are not signed"),
        ({"prompt": "a", "with_timestamps": True}, "with_timestamps: when which word"),
        ({"prompt": "a", "voice": "b"}, "voice: is not known here; there are prompt, "),
        ({"prompt": "a", "seed": -1}, "seed: must be at least 0"),
        ({"composition_plan": {}}, "composition_plan: has either sections or chunks"),
        ({"composition_plan": {"sections": []}}, "composition_plan.sections: are to last from 3000"),
        ({"composition_plan": {"sections": [section("Verse", duration_ms=120_000)] * 6}}, "to 600000 ms together"),
        ({"composition_plan": {"sections": [section("Verse", duration_ms=2)]}}, "sections.0.duration_ms: must be at"),
        ({"composition_plan": {"sections": [section("Verse", key=1)]}}, "sections.0.key: is not known here; there are"),
        ({"composition_plan": {"sections": [section("V", source_from={"song_id": "s"})]}}, "0.source_from: parts of"),
        ({"composition_plan": {"chunks": [{"song_id": "s", "range": {}}]}}, "chunks.0.song_id: parts of other songs"),
        ({"composition_plan": {"chunks": [{"duration_ms": 3_000}]}}, "composition_plan.chunks.0.text: is required"),
        ({"composition_plan": {"chunks": [], "positive_global_styles": []}}, "styles of their own"),
        ({"composition_plan": {"sections": [section("V")]}, "music_length_ms": 3_000}, "music_length_ms: goes with a"),
        ({"composition_plan": {"sections": [section("V", "la")]}, "force_instrumental": True}, "has lines to sing"),
    ],
)
def test_what_cannot_be_met_is_refused_in_words(body: dict[str, Any], words: str) -> None:
    assert words in refused(**body)


@pytest.mark.parametrize("length", [3_000, 5_000, 29_999, 100_000, 163_280, 600_000])
@pytest.mark.parametrize("model", [None, "music_v1", "music_v2_5", "HeartMuLa-oss-3B"])
def test_a_plan_made_by_rule_lasts_as_long_as_asked_and_can_be_composed(length: int, model: str | None) -> None:
    plan = planned(prompt="dream pop, slow", music_length_ms=length, model_id=model)
    song = composed(composition_plan=plan)
    assert (song.length_ms, normalize_tags(song.tags), song.instrumental) == (length, "dream pop,slow", True)
    assert ("chunks" in plan) == (model == "music_v2_5")


def test_a_plan_keeps_the_lines_of_the_prompt() -> None:
    prompt = "pop\n[Verse 1]\nHello world\n[Chorus]\nLa la"
    for model in ("music_v1", "music_v2"):
        plan = planned(prompt=prompt, music_length_ms=300_000, model_id=model)
        assert composed(composition_plan=plan).lyrics == "[Verse]\nHello world\n[Chorus]\nLa la\n[Instrumental]"
    with pytest.raises(InvalidRequest, match="music_length_ms: is to be at least 6000 for the prompt's 2 sections"):
        planned(prompt=prompt, music_length_ms=5_000)


def test_no_section_of_a_plan_is_too_short() -> None:
    plan = planned(prompt="pop\n[Intro]\n[Verse]\nHello world", music_length_ms=6_001)
    assert [section["duration_ms"] for section in plan["sections"]] == [3_000, 3_001]
    assert composed(composition_plan=plan).length_ms == 6_001


def test_a_plan_is_not_rewritten() -> None:
    with pytest.raises(InvalidRequest, match="source_composition_plan: plans are not rewritten here"):
        planned(prompt="pop", source_composition_plan={"chunks": []})
    with pytest.raises(InvalidRequest, match="prompt: is required"):
        planned()


def test_the_plan_of_a_song_makes_it_again() -> None:
    first = composed(prompt="pop,piano", lyrics_text="Hello\n[Chorus]\nLa la")
    again = composed(composition_plan=plan_of_song(first.tags, first.lyrics, 20_000))
    assert (again.lyrics, again.tags, again.length_ms) == ("[Verse]\nHello\n[Chorus]\nLa la", "pop,piano", 20_000)


def test_an_unknown_output_format_is_refused_with_the_list() -> None:
    assert output_format(None) == output_format("auto")
    for name, form in OUTPUT_FORMATS.items():
        assert name in ("auto", str(form), str(form).removesuffix("_mono"))
    with pytest.raises(ApiError, match=r"is to be one of auto, mp3_22050_32, .*opus_48000_192$") as caught:
        output_format("mp3_48000_240")
    assert (caught.value.status, caught.value.field) == (422, "output_format")
