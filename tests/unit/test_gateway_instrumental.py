"""Songs without words: what a request for one may hold, and what the model reads."""

import json

import pytest

from services.gateway.submission.instrumental import MARKS, text_of
from services.gateway.submission.validation import decode_fit, decode_request
from shared.errors import InvalidRequest


@pytest.mark.parametrize("lyrics", ["", " \n", "[Intro]\n\n  [Guitar solo] \r\n[Outro]"])
def test_lyrics_are_blank_or_section_marks(lyrics: str) -> None:
    body = json.dumps({"lyrics": lyrics, "instrumental": True}).encode()
    assert decode_request(body).lyrics == decode_fit(body).lyrics == lyrics


@pytest.mark.parametrize(
    ("lyrics", "line"), [("la la", 1), ("[Verse]\n\nla la", 3), ("[Intro] la", 1), ("[[Intro]]", 1), ("[Intro][]", 1)]
)
def test_words_are_refused_and_the_line_is_named(lyrics: str, line: int) -> None:
    body = json.dumps({"lyrics": lyrics, "instrumental": True}).encode()
    for decode in (decode_request, decode_fit):
        with pytest.raises(InvalidRequest, match=f"line {line} has") as refused:
            decode(body)
        assert refused.value.field == "lyrics"


@pytest.mark.parametrize(
    ("sent", "read"),
    [
        (("pop,piano", ""), ("pop,piano,instrumental", MARKS)),
        (("", " \n"), ("instrumental", MARKS)),
        (("Instrumental,pop", "[Intro]\n[Outro]"), ("Instrumental,pop", "[Intro]\n[Outro]")),
    ],
)
def test_the_model_reads_section_marks_and_a_tag(sent: tuple[str, str], read: tuple[str, str]) -> None:
    assert text_of(*sent) == read
    assert text_of(*read) == read
