"""The demo's tokenizer: what it makes of tags and lyrics."""

from pathlib import Path

import pytest

from ckpt.training import music, words
from shared.model.checkpoint import open_checkpoint
from shared.model.prompt import Prompt, Prompter

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def prompter() -> Prompter:
    return Prompter(open_checkpoint(ROOT / "ckpt/demo"))


def tags_of(prompt: Prompt) -> list[int]:
    return list(prompt.tags[1:-1])


@pytest.mark.parametrize(
    ("tags", "known"),
    [
        ("pop,piano,happy,fast", ["pop", "piano", "happy", "fast"]),
        ("Melancholic, Hip-Hop", ["sad", "hip hop"]),
        ("<tag>synth, 120 BPM</tag>", ["synthesizer", "fast"]),
        ("75 bpm", ["slow"]),
        ("female vocals, english, popular", []),
        ("", []),
    ],
)
def test_tags_are_known_by_several_names_and_unknown_ones_vanish(
    prompter: Prompter, tags: str, known: list[str]
) -> None:
    assert tags_of(prompter.encode(tags, "")) == [words.tag_id(tag) for tag in known]


@pytest.mark.parametrize(
    ("lyrics", "entries"),
    [
        ("hello world", [3]),
        ("the time we loved\nwanted by me", [4, 4]),
        ("[Verse 1]\nla la la\n\n[Pre-Chorus]\noh\n[CHORUS: loud]\nyeah", ["verse", 3, "verse", 1, "chorus", 1]),
        ("[whispering] a table", [3]),
        ("café crème, don't you know", [6]),
        ("你好世界\nこんにちは\nпривет мир", [4, 5, 3]),
        ("hmm 99 -", [2]),
        ("happy piano", [4]),  # of a tag's name, the syllables count
        ("la " * 20, [12, 8]),
        ("  \n\n", []),
    ],
)
def test_lyrics_become_sections_and_syllables_a_line(prompter: Prompter, lyrics: str, entries: list[str | int]) -> None:
    assert words.entries_of(list(prompter.encode("", lyrics).lyrics)) == entries


def test_the_checkpoint_has_this_tokenizer(tmp_path: Path) -> None:
    words.build(tmp_path / "tokenizer.json")
    assert (tmp_path / "tokenizer.json").read_bytes() == (ROOT / "ckpt/demo/tokenizer.json").read_bytes()


def test_tags_may_stand_on_lines(prompter: Prompter) -> None:
    assert tags_of(prompter.encode("pop\r\nhappy\n", "")) == [words.tag_id("pop"), words.tag_id("happy")]


@pytest.mark.parametrize("text", ["[", "[verse ", "[a ", "ab", "\n", "pop "])
def test_long_and_strange_lyrics_are_read(prompter: Prompter, text: str) -> None:
    """Regular expressions with unbounded look-ahead would take hours for these."""
    assert len(prompter.encode("", text * (60_000 // len(text))).lyrics) <= music.ENTRIES + 2


def test_lines_are_numbered_and_those_beyond_the_last_number_are_left_out(prompter: Prompter) -> None:
    prompt = prompter.encode("", "\n".join(["la la"] * 60))
    assert list(prompt.lyrics[1:-1]) == words.lyrics_ids([2] * music.ENTRIES)
