"""Requests against the limits of the model."""

import asyncio
import threading
from typing import cast

import pytest

from services.gateway.errors import ApiError
from services.gateway.submission.validation import FitRequest, ModelLimits
from shared.errors import InvalidRequest
from shared.model.prompt import Prompt, Prompter
from shared.schema.request import GenerateRequest


class Slow:
    """A tokenizer that works until it may go on."""

    def __init__(self) -> None:
        self.go_on = threading.Event()
        self.seen: list[str] = []
        self.at_once = self.most_at_once = 0

    def encode(self, tags: str, lyrics: str) -> Prompt:
        """Every text is one token."""
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        self.seen.append(tags)
        self.go_on.wait()
        self.at_once -= 1
        return Prompt((1,), (1,))

    def longest_ms(self, prompt: Prompt) -> int:
        """Return the same limit for every text."""
        return 80_000


async def test_one_text_is_tokenized_at_a_time_and_few_wait_to_be_measured() -> None:
    prompter = Slow()
    limits = ModelLimits(cast("Prompter", prompter))
    texts = [asyncio.create_task(limits.measure(FitRequest(lyrics="la", tags="pop, piano"))) for _ in range(10)]
    songs = [asyncio.create_task(limits.complete(GenerateRequest(lyrics="la", tags="rock, bass"))) for _ in range(3)]
    while not prompter.seen:
        await asyncio.sleep(0)
    refused = [text for text in texts if text.done()]
    prompter.go_on.set()
    found = await asyncio.gather(*texts, return_exceptions=True)
    assert [isinstance(text, ApiError) and text.status == 429 for text in found] == [False] * 4 + [True] * 6
    assert len(refused) == 6
    assert [(await song).tags for song in songs] == ["rock,bass"] * 3
    assert prompter.most_at_once == 1
    assert prompter.seen == ["pop,piano"] * 4 + ["rock,bass"] * 3


def limits() -> ModelLimits:
    """The limits of a model beside whose prompt a thousand frames fit."""
    prompter = Slow()
    prompter.go_on.set()
    return ModelLimits(cast("Prompter", prompter))


@pytest.mark.parametrize(
    ("kept", "most_ms", "wanted", "length"),
    [
        (0, None, None, 80_000),
        (0, 40_000, None, 40_000),
        (10, 40_000, None, 40_000),
        (499, 40_000, None, 40_000),
        (999, None, None, 80_000),
        (10, None, 880, 880),
    ],
)
async def test_a_song_that_begins_with_another_one_is_as_long_as_asked_or_fits(
    kept: int, most_ms: int | None, wanted: int | None, length: int
) -> None:
    request = GenerateRequest(lyrics="la", max_duration_ms=wanted)
    assert (await limits().complete(request, most_ms, kept)).max_duration_ms == length


@pytest.mark.parametrize(
    ("kept", "most_ms", "wanted", "field", "words"),
    [
        (1000, None, None, "continue_from.at_ms", "keep 79920 ms at most, or shorten them"),
        (500, 40_000, None, "continue_from.at_ms", "this key allows at most 40000 ms: keep 39920 ms at most"),
        (10, None, 800, "max_duration_ms", "ask for 880 ms at least, or keep 720 ms at most"),
        (10, None, 80, "max_duration_ms", "ask for 880 ms at least"),
    ],
)
async def test_a_song_that_begins_with_another_one_has_something_new(
    kept: int, most_ms: int | None, wanted: int | None, field: str, words: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        await limits().complete(GenerateRequest(lyrics="la", max_duration_ms=wanted), most_ms, kept)
    assert caught.value.field == field
    assert str(caught.value).endswith(words)


async def test_a_text_beside_which_nothing_of_another_song_fits_is_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Slow, "longest_ms", lambda *_: 80)
    with pytest.raises(InvalidRequest, match=r"lyrics: nothing new fits .* shorten them"):
        await limits().complete(GenerateRequest(lyrics="la"), kept=1)
    assert (await limits().complete(GenerateRequest(lyrics="la"))).max_duration_ms == 80
    text = FitRequest(lyrics="la")
    assert (await limits().measure(text, kept=5, of_frames=9)).latest_at_ms == 0


async def test_a_text_is_measured_for_what_is_kept_of_another_song() -> None:
    text = FitRequest(lyrics="la")
    found = await limits().measure(text)
    assert (found.longest_ms, found.kept_ms, found.latest_at_ms) == (80_000, None, None)
    found = await limits().measure(text, None, 30, 2_000)
    assert (found.longest_ms, found.kept_ms, found.latest_at_ms) == (80_000, 2_400, 79_920)
    assert (await limits().measure(text, 40_000, 30, 2_000)).latest_at_ms == 39_920
    assert (await limits().measure(text, None, 30, 200)).latest_at_ms == 16_000
