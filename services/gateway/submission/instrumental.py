"""Songs without words: what the model reads where `instrumental` is asked for.

The model has no switch for it. It plays what it finds no words for, so section marks alone make an instrumental song;
the tag says it once more.
"""

import re

from shared.errors import InvalidRequest

MARKS = "[Intro]\n[Instrumental]\n[Interlude]\n[Instrumental]\n[Outro]"  # where none are given
TAG = "instrumental"
_MARK = re.compile(r"\[[^\[\]]+\]")


def check_no_words(lyrics: str) -> None:
    """Raise `InvalidRequest` for lyrics that hold more than section marks, each in a line of its own."""
    for number, line in enumerate(lyrics.splitlines(), 1):
        if line.strip() and not _MARK.fullmatch(line.strip()):
            raise InvalidRequest(
                "lyrics",
                f"an instrumental song has no words, but line {number} has: leave lyrics empty, give section marks "
                "alone, such as [Intro], or leave instrumental out",
            )


def text_of(tags: str, lyrics: str) -> tuple[str, str]:
    """Tags and lyrics of an instrumental song as the model reads them. `tags` are normalized, and stay so."""
    if TAG not in tags.lower().split(","):
        tags = f"{tags},{TAG}".removeprefix(",")
    return tags, lyrics if lyrics.strip() else MARKS
